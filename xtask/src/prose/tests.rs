use super::*;

fn found(file: &str, text: &str) -> Vec<String> {
    let phrases = Phrase::read_all().unwrap();
    check(file, text, &phrases)
        .unwrap()
        .into_iter()
        .map(|finding| format!("{}: {}", finding.line, finding.text))
        .collect()
}

#[test]
fn check_of_comment_with_phrase_reports_its_line() {
    let text = "/// Returns a slice.\n///\n/// The slice lies in one\n/// piece.\nfn slice() {}\n";
    assert_eq!(found("a.rs", text), ["3: \"in one piece\""]);
}

#[test]
fn check_of_message_with_phrase_reports_it() {
    assert_eq!(
        found("a.rs", "const A: &str = \"4 bytes are to be had\";"),
        ["1: \"to be had\""]
    );
}

#[test]
fn check_of_range_without_end_reports_it() {
    for text in [
        "Reads the bytes from `offset` on.",
        "From now on, it fails.",
        "The registers from `zmm16` on need nothing.",
        "The pages\nfrom the second one\non are clean.",
    ] {
        assert_eq!(found("a.md", text).len(), 1, "{text}");
    }
    for text in [
        "Ranges from it live on without the guard.",
        "A conversion from an error on `path`.",
    ] {
        assert_eq!(found("a.md", text), [""; 0], "{text}");
    }
}

#[test]
fn check_of_code_reports_nothing() {
    for text in [
        "let answers = 1;",
        "// `answers` is a variable.",
        "let so = '\\''; // fine",
    ] {
        assert_eq!(found("a.rs", text), [""; 0], "{text}");
    }
}

#[test]
fn check_of_allowed_negation_reports_nothing() {
    assert_eq!(
        found("a.md", "It is no region."),
        ["1: \"It is no region\""]
    );
    for text in [
        "There is no region.",
        "It is no longer mapped.",
        "It is not a region.",
    ] {
        assert_eq!(found("a.md", text), [""; 0], "{text}");
    }
}

#[test]
fn check_of_safety_comment_without_proof_reports_it() {
    for text in [
        "// SAFETY: as above.",
        "// SAFETY: the same contract.",
        "// SAFETY: within the operand, for the same\n// reason.",
        "// SAFETY: 1. The pointer is valid.\n// 2. The length, as above.",
    ] {
        let found = found("a.rs", text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
    }
    for text in [
        "// SAFETY: the sizes are the same (just checked).",
        "// SAFETY: both are in the same mapping.",
    ] {
        assert_eq!(found("a.rs", text), [""; 0], "{text}");
    }
}

#[test]
fn check_of_safety_section_with_reference_reports_it() {
    let section =
        |heading| format!("/// {heading}\n///\n/// As for [`copy`](Self::copy).\nfn a() {{}}");
    assert_eq!(
        found("a.rs", &section("# Safety")),
        ["3: \"As for\" in a section `# Safety`"]
    );
    assert_eq!(found("a.rs", &section("# Errors")), [""; 0]);
}

#[test]
fn check_of_opening_clause_reports_it() {
    for text in [
        "/// What the guest wrote.\nfn a() {}",
        "//! Where the region ends.",
        "// How many there are.",
        "/// - Who uses it.",
    ] {
        let found = found("a.rs", text);
        assert!(
            found.len() == 1 && found.first().unwrap().contains("opens with"),
            "{text}: {found:?}"
        );
    }
}

#[test]
fn check_of_questions_headings_and_main_clauses_reports_nothing() {
    for text in [
        "# How it works",
        "What does a region cost? One word.",
        "Where there is no KVM, the driver is a thread.",
        "| What | How |",
        "```text\nWhat the guest wrote\n```",
    ] {
        assert_eq!(found("a.md", text), [""; 0], "{text}");
    }
}

#[test]
fn check_of_long_lines_reports_prose_only() {
    let words = "word ".repeat(24);
    assert_eq!(found("a.rs", &format!("// {words}")), ["1: 123 columns"]);
    for text in [
        format!("//! | {words} |"),
        format!("// https://example.org/{words}"),
        format!("let a = \"{words}\";"),
    ] {
        assert_eq!(found("a.rs", &text), [""; 0], "{text}");
    }
}

#[test]
fn check_of_long_sentence_reports_its_line_and_words() {
    let long = format!("{}end.", "w ".repeat(25));
    assert_eq!(
        found(
            "a.rs",
            &format!("/// A slice.\n/// It has\n/// {long}\nfn a() {{}}")
        ),
        ["2: a sentence of 28 words"]
    );
    assert_eq!(
        found("a.md", &format!("1. One.\n2. {long}\n")),
        ["2: a sentence of 26 words"]
    );
    let script = format!("#!/bin/sh\n# One\n# {long}\necho {long}\n");
    assert_eq!(found("a", &script), ["2: a sentence of 27 words"]);
}

#[test]
fn check_of_texts_that_are_not_one_sentence_reports_nothing() {
    let words = "w ".repeat(20);
    for text in [
        format!("{words}end (of it). {words}"),
        format!("{words}\n- {words}\n- {words}"),
        format!("{words}\n`{words}` [link](../{}/a.md)", "a/b.".repeat(9)),
        format!("| {words} | {words} |"),
        format!("# {words}\n{words}"),
        format!("```text\n{words}\n{words}\n```"),
        format!("{words}\n\n    {words}\n    {words}\n\nEnd."),
        "[`A`]: crate::A\n".repeat(20),
    ] {
        assert_eq!(found("a.md", &text), [""; 0], "{text}");
    }
    let code = format!("// {words}\n\n// {words}\nlet a = 1; // {words}\n/// {words}\nfn a() {{}}");
    assert_eq!(found("a.rs", &code), [""; 0]);
}

#[test]
fn sentences_with_abbreviation_do_not_end_at_it() {
    assert_eq!(sentences("One, e.g. two. Three?"), [(0, 3), (15, 1)]);
    assert_eq!(sentences("\"One.\" Two (i.e. three)"), [(0, 1), (7, 3)]);
}

#[test]
fn first_sentence_ends_at_its_mark() {
    assert_eq!(first_sentence("One. Two."), "One.");
    assert_eq!(first_sentence("See a.b, then"), "See a.b, then");
}
