//! The sentences of a paragraph, and their words.

/// Abbreviations whose full stop does not end a sentence.
const ABBREVIATIONS: [&str; 4] = ["cf.", "e.g.", "i.e.", "vs."];

/// Returns the offset at which each sentence of a text starts, and its number of words.
///
/// A sentence ends at a word that ends with `.`, `?` or `!`, before closing brackets, quotes and
/// marks of emphasis. The number of an item also ends one. Inline code and the text of a link count
/// as words, and addresses of links do not: they have no blanks.
pub fn sentences(text: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let (mut start, mut words) = (None, 0_usize);
    for (offset, word) in words_of(text) {
        let start_of_this = *start.get_or_insert(offset);
        if word.contains(|c: char| c.is_alphanumeric() || c == '_') && word != "SAFETY:" {
            words = words.saturating_add(1);
        }
        let closed = word.trim_end_matches([')', ']', '"', '*']);
        let opened = closed.trim_start_matches(['(', '[', '"', '*']);
        if closed.ends_with(['.', '?', '!']) && !ABBREVIATIONS.contains(&opened) {
            found.push((start_of_this, words));
            (start, words) = (None, 0);
        }
    }
    found.extend(start.map(|start| (start, words)));
    found
}

/// Returns the parts of a text between blanks, each with its offset.
fn words_of(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split(' ')
        .scan(0_usize, |next, word| {
            let offset = *next;
            *next = offset.saturating_add(word.len()).saturating_add(1);
            Some((offset, word))
        })
        .filter(|(_, word)| !word.is_empty())
}
