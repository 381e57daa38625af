//! The last valid content of a file, in memory and on disk.

use super::*;

#[test]
fn a_file_with_errors_keeps_its_last_valid_content_and_other_files_change() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.reread();
    fixture.write("a.yaml", &(service("a2", "") + "kind: Service\nmetadata: [oops"));
    fixture.write("b.yaml", &service("b2", ""));
    assert_eq!(fixture.reread(), ["-Service default/b", "+Service default/b2"]);
    assert_eq!(fixture.errors().len(), 1);
    assert_eq!(fixture.state.status.files[0].objects, 1);
    fixture.write("a.yaml", &service("a2", ""));
    assert_eq!(fixture.reread(), ["-Service default/a", "+Service default/a2"]);
    assert_eq!(fixture.errors(), Vec::<String>::new());
    fixture.remove("a.yaml");
    assert_eq!(fixture.reread(), ["-Service default/a2"]);
}

#[test]
fn the_last_valid_content_stays_in_force_over_a_restart() {
    let stored = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.state.settings.last_good = Some(stored.path().join("stored"));
    let restart = |fixture: &mut Fixture| fixture.state = State::new(fixture.state.settings.clone());
    restart(&mut fixture);
    fixture.reread();
    let broken = "kind: Service\nmetadata: [oops";
    for text in [broken.as_bytes(), b"a: \xff"] {
        fs::write(fixture.directory.path().join("a.yaml"), text).unwrap();
        fixture.write("b.yaml", &service("b2", ""));
        restart(&mut fixture);
        assert_eq!(fixture.reread(), ["+Service default/a", "+Service default/b2"]);
        assert_eq!(fixture.errors().len(), 1);
        assert_eq!(fixture.state.status.files[0].objects, 1);
        assert_eq!(fixture.reread(), Vec::<String>::new());
    }
    fixture.write("a.yaml", &service("a2", ""));
    assert_eq!(fixture.reread(), ["-Service default/a", "+Service default/a2"]);

    // The stored text of a deleted file is dropped, also if a file with errors of that name is created later.
    fixture.remove("a.yaml");
    restart(&mut fixture);
    assert_eq!(fixture.reread(), ["+Service default/b2"]);
    fixture.write("a.yaml", broken);
    restart(&mut fixture);
    assert_eq!(fixture.reread(), ["+Service default/b2"]);
}

#[test]
fn valid_content_is_stored_once_the_disk_has_space_again() {
    let disk = tempfile::tempdir().unwrap();
    let full = disk.path().join("full");
    fs::write(&full, "").unwrap();
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", &service("b", ""))]);
    fixture.state.settings.last_good = Some(full.join("stored"));
    fixture.state = State::new(fixture.state.settings.clone());
    fixture.await_old_files();
    assert_eq!(fixture.reread(), ["+Service default/a", "+Service default/b"]);
    fs::remove_file(&full).unwrap();
    assert_eq!(fixture.reread(), Vec::<String>::new());
    for name in ["a.yaml", "b.yaml"] {
        fixture.write(name, "kind: Service");
    }
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.reread(), ["+Service default/a", "+Service default/b"]);
}

#[test]
fn valid_content_is_stored_next_to_the_status_file() {
    let stored = tempfile::tempdir().unwrap();
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", ""))]);
    fixture.state.settings.status_file = Some(stored.path().join("status.json"));
    fixture.state = State::new(fixture.state.settings.clone());
    fixture.reread();
    fixture.write("a.yaml", "kind: Service");
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.reread(), ["+Service default/a"]);
}

#[test]
fn manifests_are_followed_even_if_nothing_can_be_stored() {
    let mut fixture = Fixture::new(&[("a.yaml", &service("a", "")), ("b.yaml", "kind: Service")]);
    fixture.state.settings.last_good = Some("/proc/weir".into());
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.reread(), ["+Service default/a"]);
    fixture.write("b.yaml", &service("b", ""));
    assert_eq!(fixture.reread(), ["+Service default/b"]);
}

/// The previous agent knew another field. Its content stays in force, and the field is an error.
#[test]
fn stored_content_with_an_unknown_field_stays_in_force() {
    let stored = tempfile::tempdir().unwrap();
    let text = service("a", "fieldOfAnotherVersion: 1");
    let mut fixture = Fixture::new(&[("a.yaml", &text)]);
    fs::write(stored.path().join("a.yaml"), &text).unwrap();
    fixture.state.settings.last_good = Some(stored.path().to_owned());
    fixture.state = State::new(fixture.state.settings.clone());
    assert_eq!(fixture.reread(), ["+Service default/a"]);
    let error =
        "a.yaml: document 1 (Service default/a): `spec.fieldOfAnotherVersion` is not a field of this kind";
    assert_eq!(fixture.errors(), [error]);
}
