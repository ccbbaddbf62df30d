//! The comments, string literals and other tokens of Rust source.
//!
//! `proc_macro2` splits the source. It drops ordinary comments: they are the text between two
//! tokens that is not blank.

use anyhow::{anyhow, Result};
use proc_macro2::{Span, TokenStream, TokenTree};

/// The kind of a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Comments, documentation included, with their delimiters and the blanks around them.
    Comment,
    /// A string literal, with its quotes.
    Text,
    /// Any other token.
    Code,
}

/// A part of a source text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'text> {
    /// The kind of the part.
    pub kind: Kind,
    /// The line that it begins on, counted from 1.
    pub line: usize,
    /// The part.
    pub text: &'text str,
}

impl<'text> Token<'text> {
    /// Returns the lines of the token, each with its number.
    pub fn lines(self) -> impl Iterator<Item = (usize, &'text str)> {
        (self.line..).zip(self.text.split('\n'))
    }
}

/// Splits Rust source into comments, string literals and other tokens.
///
/// # Errors
///
/// Returns an error with the line of the first text that is not a token.
pub fn lex(source: &str) -> Result<Vec<Token<'_>>> {
    let tokens: TokenStream = source.parse().map_err(|error: proc_macro2::LexError| {
        anyhow!("{error} in line {}", error.span().start().line)
    })?;
    let mut lexer = Lexer {
        source,
        end: 0,
        line: 1,
        found: Vec::new(),
    };
    lexer.add_all(tokens);
    lexer.add_comments(source.len());
    Ok(lexer.found)
}

struct Lexer<'text> {
    source: &'text str,
    /// The end of the last token.
    end: usize,
    /// The line of that end.
    line: usize,
    found: Vec<Token<'text>>,
}

impl Lexer<'_> {
    fn add_all(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => {
                    self.add(group.span_open(), Kind::Code);
                    self.add_all(group.stream());
                    self.add(group.span_close(), Kind::Code);
                }
                TokenTree::Literal(literal) if literal.to_string().ends_with(['"', '#']) => {
                    self.add(literal.span(), Kind::Text);
                }
                token => self.add(token.span(), Kind::Code),
            }
        }
    }

    /// Adds a token, and the comments before it.
    fn add(&mut self, span: Span, kind: Kind) {
        let range = span.byte_range();
        // A documentation comment is the tokens of an attribute, which all have the same place.
        if range.start < self.end {
            return;
        }
        self.add_comments(range.start);
        let text = self.source.get(range.clone()).unwrap_or_default();
        let comment = text.starts_with("//") || text.starts_with("/*");
        self.found.push(Token {
            kind: if comment { Kind::Comment } else { kind },
            line: span.start().line,
            text,
        });
        (self.end, self.line) = (range.end, span.end().line);
    }

    /// Adds the text between the last token and the next one, if it is not blank.
    fn add_comments(&mut self, next: usize) {
        let text = self.source.get(self.end..next).unwrap_or_default();
        if !text.trim().is_empty() {
            self.found.push(Token {
                kind: Kind::Comment,
                line: self.line,
                text,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the tokens, with adjacent ones of the kind `Code` joined by a space.
    fn kinds(source: &str) -> Vec<(Kind, usize, String)> {
        let mut found: Vec<(Kind, usize, String)> = Vec::new();
        for token in lex(source).unwrap() {
            match found.last_mut() {
                Some((Kind::Code, _, text)) if token.kind == Kind::Code => {
                    *text = format!("{text} {}", token.text);
                }
                _ => found.push((token.kind, token.line, token.text.trim().to_owned())),
            }
        }
        found
    }

    #[test]
    fn lex_of_comments_strings_and_code_separates_them() {
        assert_eq!(
            kinds("let a = \"// no \\\" comment\"; // yes\n/* one /* two */ */\n/// doc\nx"),
            [
                (Kind::Code, 1, "let a =".into()),
                (Kind::Text, 1, "\"// no \\\" comment\"".into()),
                (Kind::Code, 1, ";".into()),
                (Kind::Comment, 1, "// yes\n/* one /* two */ */".into()),
                (Kind::Comment, 3, "/// doc".into()),
                (Kind::Code, 4, "x".into()),
            ]
        );
    }

    #[test]
    fn lex_of_raw_strings_ends_at_their_hashes() {
        assert_eq!(
            kinds("r#\"a \" b\"#;"),
            [
                (Kind::Text, 1, "r#\"a \" b\"#".into()),
                (Kind::Code, 1, ";".into())
            ]
        );
    }

    #[test]
    fn lex_of_quotes_in_characters_and_lifetimes_is_code() {
        for code in ["'\"'", "'\\''", "b'\"'", "&'a str", "'\\u{22}'"] {
            let found = lex(code).unwrap();
            assert!(
                found.iter().all(|token| token.kind == Kind::Code),
                "{code}: {found:?}"
            );
        }
    }

    #[test]
    fn lex_after_strings_and_comments_of_several_lines_counts_them() {
        let last = lex("\"a\nb\" /* c\n */ d // e").unwrap().pop().unwrap();
        assert_eq!(
            (last.kind, last.line, last.text),
            (Kind::Comment, 3, " // e")
        );
    }

    #[test]
    fn lex_of_unclosed_string_returns_error() {
        assert!(lex("let a = \"b;").is_err());
    }
}
