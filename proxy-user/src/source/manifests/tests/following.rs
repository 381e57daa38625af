//! The running source: which changes of files and of the directory it notices.

use super::*;

/// A running source and its directory.
struct Running {
    directory: tempfile::TempDir,
    changes: mpsc::Receiver<Change>,
    view: watch::Receiver<Arc<ManifestStatus>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (sender, changes) = mpsc::channel(64);
        let (viewer, view) = watch::channel(Arc::default());
        let settings = ManifestSource::new(directory.path().join(name), "n1");
        let task = tokio::spawn(watch(settings, sender, Arc::default(), viewer));
        Self { directory, changes, view, task }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn next(&mut self) -> String {
        let change =
            timeout(Duration::from_secs(10), self.changes.recv()).await.expect("a change before the timeout");
        word(&change.expect("the source still runs"))
    }

    async fn synced(&mut self) {
        for kind in Kind::ALL {
            assert_eq!(self.next().await, format!("{kind} synced"));
        }
    }
}

#[tokio::test]
async fn written_renamed_and_deleted_files_are_noticed() {
    let mut source = Running::start(".");
    source.synced().await;
    fs::write(source.path("a.yaml"), service("a", "")).unwrap();
    assert_eq!(source.next().await, "+Service default/a");
    // In the way of editors.
    fs::write(source.path(".a.yaml.swp"), service("b", "")).unwrap();
    fs::rename(source.path(".a.yaml.swp"), source.path("a.yaml")).unwrap();
    assert_eq!(source.next().await, "-Service default/a");
    assert_eq!(source.next().await, "+Service default/b");
    fs::remove_file(source.path("a.yaml")).unwrap();
    assert_eq!(source.next().await, "-Service default/b");
}

#[tokio::test]
async fn a_file_is_not_read_while_it_is_being_written() {
    use std::io::Write;
    let mut source = Running::start(".");
    source.synced().await;
    fs::write(source.path("a.yaml"), service("a", "")).unwrap();
    assert_eq!(source.next().await, "+Service default/a");
    let mut file = fs::File::create(source.path("a.yaml")).unwrap();
    for other in ["b", "c"] {
        // A slow writer does not delay other files.
        fs::write(source.path(&format!("{other}.yaml")), service(other, "")).unwrap();
        assert_eq!(source.next().await, format!("+Service default/{other}"), "the first file is truncated");
        file.write_all(b"# a long preface\n").unwrap();
    }
    file.write_all(service("a", "sessionAffinity: ClientIP").as_bytes()).unwrap();
    drop(file);
    assert_eq!(source.next().await, "+Service default/a");
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_symlinks() {
    let mut source = Running::start("mount");
    let publish = |source: &Running, version: &str, text: &str| {
        let mount = source.path("mount");
        fs::create_dir_all(mount.join(version)).unwrap();
        fs::write(mount.join(version).join("a.yaml"), text).unwrap();
        std::os::unix::fs::symlink(version, mount.join("..data_tmp")).unwrap();
        fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
    };
    publish(&source, "..1", &service("a", ""));
    std::os::unix::fs::symlink("..data/a.yaml", source.path("mount/a.yaml")).unwrap();
    let mut first: Vec<String> = Vec::new();
    for _ in 0..5 {
        first.push(source.next().await);
    }
    assert!(first.contains(&"+Service default/a".to_owned()), "{first:?}");
    publish(&source, "..2", &service("b", ""));
    assert_eq!(source.next().await, "-Service default/a");
    assert_eq!(source.next().await, "+Service default/b");
}

#[tokio::test]
async fn a_directory_may_be_created_late_deleted_and_created_again() {
    let mut source = Running::start("later");
    source.view.wait_for(|status| status.error.is_some()).await.unwrap();
    assert!(source.changes.is_empty(), "nothing is synced before the directory was read");
    for round in ["a", "b", "c"] {
        let staged = source.path("staged");
        fs::create_dir(&staged).unwrap();
        fs::write(staged.join("x.yaml"), service(round, "")).unwrap();
        fs::rename(&staged, source.path("later")).unwrap();
        let mut change = source.next().await;
        if change.starts_with('-') {
            change = source.next().await;
        }
        assert_eq!(change, format!("+Service default/{round}"));
        if round == "a" {
            source.synced().await;
        }
        // The new directory is watched as the first one was.
        fs::write(source.path("later/y.yaml"), service("y", "")).unwrap();
        assert_eq!(source.next().await, "+Service default/y");
        fs::remove_file(source.path("later/y.yaml")).unwrap();
        assert_eq!(source.next().await, "-Service default/y");
        fs::remove_dir_all(source.path("later")).unwrap();
        source.view.wait_for(|status| status.error.is_some()).await.unwrap();
    }
}

#[tokio::test]
async fn the_source_ends_when_the_receiver_is_dropped() {
    let mut source = Running::start(".");
    source.synced().await;
    source.changes.close();
    timeout(Duration::from_secs(10), source.task).await.expect("the source ends before the timeout").unwrap();
}
