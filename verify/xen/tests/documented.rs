//! `docs/xen-scenarios.md` names each scenario, and a test for each fault of 0.18.0.

use std::collections::BTreeSet;

use verify_xen::scenarios;

/// Faults without a scenario, and the tests in `src/xen` that check for them.
const OTHER_TESTS: [(&str, &str); 1] = [(
    "X19",
    "arguments_have_the_layout_of_linux_and_no_uninitialised_bytes",
)];

/// Returns the code and the name in each row of the tables. A table may have no codes.
fn rows(text: &str) -> BTreeSet<(String, String)> {
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim_matches('|').split('|');
        line.map(|cell| cell.trim().replace('`', "")).collect()
    };
    let rows = text.lines().filter(|line| line.starts_with('|')).map(cells);
    rows.filter_map(|cells| match &cells[..] {
        [code, _, name, ..] if code.starts_with('X') => Some((code.clone(), name.clone())),
        [name, ..] => Some((String::new(), name.clone())),
        [] => None,
    })
    .collect()
}

#[test]
fn document_names_each_scenario_with_its_fault() {
    let text = include_str!("../../../docs/xen-scenarios.md");
    let rows = rows(text);
    let listed = scenarios::all().map(|scenario| match scenario.group {
        "ordinary_use" => ("", scenario.name),
        code => (code, scenario.name),
    });
    let missing: Vec<_> = listed
        .chain(OTHER_TESTS)
        .filter(|(code, name)| !rows.contains(&(code.to_string(), name.to_string())))
        .collect();
    assert!(missing.is_empty(), "not in the document: {missing:#?}");
}

#[test]
fn each_fault_of_the_published_version_has_a_test() {
    let codes: BTreeSet<&str> = scenarios::all().map(|scenario| scenario.group).collect();
    let others = OTHER_TESTS.map(|(code, _)| code);
    for number in 1..=25 {
        let code = format!("X{number}");
        let tested = codes.contains(code.as_str()) || others.contains(&code.as_str());
        assert!(tested, "{code} has no scenario");
    }
}

#[test]
fn tests_beside_the_code_exist() {
    let code = include_str!("../../../src/xen/devices.rs");
    for (_, name) in OTHER_TESTS {
        assert!(code.contains(&format!("fn {name}()")), "{name} is gone");
    }
}
