//! A lexer that separates the comments, string literals and code of Rust source.

/// The kind of a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A comment, documentation included, with its delimiters.
    Comment,
    /// A string literal, with its quotes.
    Text,
    /// Everything else. It may span lines.
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
        (self.line..).zip(self.text.lines())
    }
}

/// Splits Rust source into comments, string literals, and the code between them.
pub fn lex(source: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let (mut line, mut code, mut rest) = (1_usize, source, source);
    while !rest.is_empty() {
        let (kind, after) = next(rest);
        if kind == Kind::Code {
            rest = after;
            continue;
        }
        push(&mut tokens, &mut line, Kind::Code, code, rest);
        push(&mut tokens, &mut line, kind, rest, after);
        (code, rest) = (after, after);
    }
    push(&mut tokens, &mut line, Kind::Code, code, rest);
    tokens
}

/// Adds the part of `start` before its suffix `end`, if that part is not empty.
fn push<'text>(
    tokens: &mut Vec<Token<'text>>,
    line: &mut usize,
    kind: Kind,
    start: &'text str,
    end: &'text str,
) {
    let text = start.strip_suffix(end).unwrap_or_default();
    if !text.is_empty() {
        tokens.push(Token {
            kind,
            line: *line,
            text,
        });
        *line = line.saturating_add(text.matches('\n').count());
    }
}

/// Returns the kind of the first token of a non-empty text, and the text after the token.
fn next(rest: &str) -> (Kind, &str) {
    if rest.starts_with("//") {
        return (
            Kind::Comment,
            rest.find('\n').map_or("", |end| tail(rest, end)),
        );
    }
    if let Some(inside) = rest.strip_prefix("/*") {
        return (Kind::Comment, after_block_comment(inside));
    }
    let name = rest.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_');
    let prefix = rest.strip_suffix(name).unwrap_or_default();
    if matches!(prefix, "" | "b" | "c") {
        if let Some(inside) = name.strip_prefix('"') {
            return (Kind::Text, after_string(inside));
        }
    }
    if matches!(prefix, "r" | "br" | "cr") {
        let quoted = name.trim_start_matches('#');
        if let Some(inside) = quoted.strip_prefix('"') {
            let hashes = name.strip_suffix(quoted).unwrap_or_default();
            let end = format!("\"{hashes}");
            return (
                Kind::Text,
                inside.split_once(&end).map_or("", |(_, after)| after),
            );
        }
    }
    if let (true, Some(inside)) = (matches!(prefix, "" | "b"), name.strip_prefix('\'')) {
        return (Kind::Code, after_char(inside));
    }
    (
        Kind::Code,
        if prefix.is_empty() {
            skip(rest, 1)
        } else {
            name
        },
    )
}

/// Returns the text after `count` characters.
fn skip(text: &str, count: usize) -> &str {
    let mut chars = text.chars();
    for _ in 0..count {
        chars.next();
    }
    chars.as_str()
}

fn tail(text: &str, start: usize) -> &str {
    text.get(start..).unwrap_or_default()
}

/// Returns the text after a block comment whose opening was read. Comments nest.
fn after_block_comment(mut rest: &str) -> &str {
    let mut depth = 1_usize;
    while depth > 0 && !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("/*") {
            (depth, rest) = (depth.saturating_add(1), after);
        } else if let Some(after) = rest.strip_prefix("*/") {
            (depth, rest) = (depth.saturating_sub(1), after);
        } else {
            rest = skip(rest, 1);
        }
    }
    rest
}

/// Returns the text after a string literal whose opening quote was read.
fn after_string(mut rest: &str) -> &str {
    loop {
        match rest.find(['"', '\\']) {
            None => return "",
            Some(at) if tail(rest, at).starts_with('\\') => rest = skip(tail(rest, at), 2),
            Some(at) => return skip(tail(rest, at), 1),
        }
    }
}

/// Returns the text after a character literal or a lifetime whose quote was read.
fn after_char(rest: &str) -> &str {
    if rest.starts_with('\\') {
        let escaped = skip(rest, 2);
        return escaped.split_once('\'').map_or("", |(_, after)| after);
    }
    let after = skip(rest, 1);
    after.strip_prefix('\'').unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(source: &str) -> Vec<(Kind, usize, &str)> {
        lex(source)
            .into_iter()
            .map(|token| (token.kind, token.line, token.text))
            .collect()
    }

    #[test]
    fn lex_of_comments_strings_and_code_separates_them() {
        assert_eq!(
            kinds("let a = \"// no \\\" comment\"; // yes\n/* one /* two */ */x"),
            [
                (Kind::Code, 1, "let a = "),
                (Kind::Text, 1, "\"// no \\\" comment\""),
                (Kind::Code, 1, "; "),
                (Kind::Comment, 1, "// yes"),
                (Kind::Code, 1, "\n"),
                (Kind::Comment, 2, "/* one /* two */ */"),
                (Kind::Code, 2, "x"),
            ]
        );
    }

    #[test]
    fn lex_of_raw_strings_ends_at_their_hashes() {
        assert_eq!(
            kinds("r#\"a \" b\"#;"),
            [(Kind::Text, 1, "r#\"a \" b\"#"), (Kind::Code, 1, ";")]
        );
    }

    #[test]
    fn lex_of_quotes_in_characters_and_lifetimes_is_code() {
        for code in ["'\"'", "'\\''", "b'\"'", "&'a str", "'\\u{22}'"] {
            let all: String = lex(code).iter().map(|token| token.text).collect();
            assert_eq!(all, code);
            assert!(
                lex(code).iter().all(|token| token.kind == Kind::Code),
                "{code}"
            );
        }
    }

    #[test]
    fn lex_counts_lines_within_strings() {
        let last = lex("\"a\nb\" // c").pop().unwrap();
        assert_eq!((last.line, last.text), (2, "// c"));
    }
}
