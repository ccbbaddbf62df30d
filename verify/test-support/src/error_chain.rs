//! [`error_chain`]: the messages of an error and of its causes. [`assert_causes_printed_once`]:
//! checks that the first of them repeats none of the others.

use std::error::Error;
use std::iter::successors;

fn messages(error: &dyn Error) -> Vec<String> {
    let chain = successors(Some(error), |&error| error.source());
    chain.map(ToString::to_string).collect()
}

/// Returns the message of an error and those of its causes, separated by colons.
pub fn error_chain(error: &dyn Error) -> String {
    messages(error).join(": ")
}

/// Checks that the message of an error does not contain the message of one of its causes.
///
/// The errors of 0.18.0 contain their causes, and may be causes themselves. So the messages of the
/// causes are not compared with each other.
///
/// # Panics
///
/// Panics if the message contains that of a cause.
#[track_caller]
pub fn assert_causes_printed_once(error: &dyn Error) {
    if let Some((message, causes)) = messages(error).split_first() {
        for cause in causes {
            assert!(!message.contains(cause), "{message}\nrepeats\n{cause}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::{self, Display};

    use super::*;

    #[derive(Debug)]
    struct Outer(&'static str, std::io::Error);

    impl Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.1)
        }
    }

    #[test]
    fn error_chain_joins_the_messages_of_all_causes() {
        let error = Outer("cannot map", std::io::Error::other("no room"));
        assert_causes_printed_once(&error);
        assert_eq!(error_chain(&error), "cannot map: no room");
    }

    #[test]
    #[should_panic(expected = "repeats")]
    fn assert_causes_printed_once_of_repeated_cause_panics() {
        let error = Outer("cannot map: no room", std::io::Error::other("no room"));
        assert_causes_printed_once(&error);
    }
}
