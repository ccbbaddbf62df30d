//! [`error_chain`]: the messages of an error and of its causes. [`assert_causes_printed_once`]:
//! checks that none of them repeats another one.

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

/// Checks that no message of an error or of its causes contains the message of a later cause.
///
/// A caller that prints all of them prints each cause once.
///
/// # Panics
///
/// Panics if a message contains that of a cause.
#[track_caller]
pub fn assert_causes_printed_once(error: &dyn Error) {
    let messages = messages(error);
    let mut rest = messages.as_slice();
    while let Some((message, causes)) = rest.split_first() {
        for cause in causes {
            assert!(!message.contains(cause), "{message}\nrepeats\n{cause}");
        }
        rest = causes;
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
