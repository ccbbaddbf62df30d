use super::*;

fn user() -> &'static User {
    USERS.first().unwrap()
}

fn harness(ours: &Path, published: bool) -> Harness {
    let root = ours.parent().unwrap().to_owned();
    Harness {
        folder: root.join("target/compat"),
        ours: ours.to_owned(),
        root,
        published,
    }
}

fn passed(passed: u64) -> Counts {
    Counts {
        programs: 1,
        passed,
        ..Counts::default()
    }
}

#[test]
fn check_counts_with_fewer_passes_than_expected_returns_error() {
    assert!(check_counts(user().expected, &passed(user().expected)).is_ok());
    assert!(check_counts(user().expected, &passed(user().expected + 1)).is_ok());
    let why = check_counts(user().expected, &passed(user().expected - 1))
        .unwrap_err()
        .to_string();
    assert_eq!(why, "57 passed, but 58 pass on vm-memory 0.18.0");
}

#[test]
fn check_counts_with_failed_test_returns_error() {
    let counts = Counts {
        failed: 1,
        ..passed(1000)
    };
    assert_eq!(
        check_counts(user().expected, &counts)
            .unwrap_err()
            .to_string(),
        "1 failed"
    );
    assert!(check_counts(user().expected, &Counts::default()).is_err());
}

#[test]
fn check_source_with_other_vm_memory_returns_error() {
    let folder = tempfile::tempdir().unwrap();
    let manifests = ["ours", "registry"].map(|name| {
        let path = folder.path().join(name).join("Cargo.toml");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        path
    });
    let [ours, registry] = &manifests;
    let check = |published, found: &[&PathBuf]| {
        harness(ours, published)
            .check_source("thing", &found.iter().map(|path| (*path).clone()).collect())
            .map_err(|error| error.to_string())
    };
    assert_eq!(check(false, &[ours]), Ok(()));
    assert_eq!(check(true, &[registry]), Ok(()));
    let why = format!("the wrong vm-memory was built: {}", registry.display());
    assert_eq!(check(false, &[registry]), Err(why.clone()));
    assert_eq!(check(false, &[ours, registry]), Err(why));
    assert!(check(true, &[ours]).is_err());
    assert!(check(false, &[])
        .unwrap_err()
        .ends_with("without vm-memory"));
}

#[test]
fn copy_crate_makes_a_separate_workspace() {
    let folder = tempfile::tempdir().unwrap();
    let (source, copy) = (
        folder.path().join("source"),
        folder.path().join("thing-0.1.0"),
    );
    fs::create_dir_all(source.join("src/deep")).unwrap();
    fs::write(source.join("Cargo.toml"), "[package]\nname = \"thing\"").unwrap();
    fs::write(source.join("src/deep/a.rs"), "// a").unwrap();
    // The remains of an interrupted run are not used.
    fs::create_dir_all(folder.path().join("thing-0.1.0.partial/stale")).unwrap();

    copy_crate(&source, &copy).unwrap();
    let manifest = fs::read_to_string(copy.join("Cargo.toml")).unwrap();
    assert_eq!(manifest, "[package]\nname = \"thing\"\n[workspace]\n");
    assert_eq!(
        fs::read_to_string(copy.join("src/deep/a.rs")).unwrap(),
        "// a"
    );
    assert!(!copy.join("stale").exists());

    fs::write(source.join("Cargo.toml"), "[workspace]\n").unwrap();
    assert!(copy_crate(&source, &folder.path().join("other")).is_err());
}

#[test]
fn fetch_manifest_pins_versions() {
    let manifest = fetch_manifest(&BTreeSet::from([("a", "1.2.3"), ("b", "0.1.0")])).unwrap();
    assert!(manifest.ends_with("[workspace]\n\n[dependencies]\na = \"=1.2.3\"\nb = \"=0.1.0\"\n"));
}

#[test]
fn report_of_row_has_failure_and_reason_of_skips() {
    let bzimage = |user: &&User| user.variant == Some("bzimage");
    let user = USERS.iter().find(bzimage).unwrap();
    let mut row = Row {
        user,
        counts: Counts {
            left_out: 2,
            ..passed(52)
        },
        took: Duration::from_secs(3),
        failure: None,
    };
    let counted = format!(
        "linux-loader-bzimage 0.14.0, bzimage, elf, pe: 52 passed, 52 expected, 0 ignored, \
         2 left out ({}), 3 s: ",
        user.reason
    );
    assert_eq!(row.report(), format!("{counted}ok"));
    row.failure = Some("2 failed".to_owned());
    assert_eq!(row.report(), format!("{counted}FAILED: 2 failed"));
}
