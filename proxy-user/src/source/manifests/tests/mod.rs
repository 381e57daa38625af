//! Manifests in a temporary directory, and the changes that the source reports.

use std::{fs, net::IpAddr, time::Duration};

use k8s_openapi::api::core::v1::ServiceSpec;
use tokio::time::timeout;

use super::*;
use crate::model::Object;

mod allocation;
mod content;
mod errors;
mod following;
mod last_valid;

/// A directory with a source that reads it.
struct Fixture {
    directory: tempfile::TempDir,
    state: State,
}

impl Fixture {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = State::new(ManifestSource::new(directory.path(), "n1"));
        let fixture = Self { directory, state };
        for (name, text) in files {
            fixture.write(name, text);
        }
        fixture
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).unwrap();
    }

    /// Waits until no file is read again merely because it is new.
    fn await_old_files(&self) {
        use std::{os::unix::fs::MetadataExt, time::SystemTime};
        let changed = |entry: fs::DirEntry| entry.metadata().unwrap().ctime() as u64;
        let last = fs::read_dir(self.directory.path()).unwrap().map(|entry| changed(entry.unwrap())).max();
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        while last.is_some_and(|last| now() <= last + 3) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.path().join(name)).unwrap();
    }

    /// Reads the directory and returns each change as a word.
    fn reread(&mut self) -> Vec<String> {
        self.state.reread(&HashSet::new()).iter().map(word).collect()
    }

    /// The errors of all files.
    fn errors(&self) -> Vec<String> {
        let files = &self.state.status.files;
        files
            .iter()
            .flat_map(|file| file.errors.iter().map(|error| format!("{}: {error}", file.name)))
            .collect()
    }

    /// The spec of a Service as the source would report it.
    fn spec(&self, name: &str) -> ServiceSpec {
        spec(&load_once(&self.state.settings).unwrap(), name)
    }
}

fn word(change: &Change) -> String {
    match change {
        Change::Apply(object) => format!("+{} {}", object.kind(), object.name()),
        Change::Delete(kind, name) => format!("-{kind} {name}"),
        Change::Synced(kind) => format!("{kind} synced"),
    }
}

fn spec(changes: &[Change], name: &str) -> ServiceSpec {
    let found = changes.iter().find_map(|change| match change {
        Change::Apply(Object::Service(service)) if service.metadata.name.as_deref() == Some(name) => {
            service.spec.clone()
        }
        _ => None,
    });
    found.unwrap_or_else(|| panic!("no Service {name}"))
}

/// A Service with additional fields in its spec.
fn service(name: &str, more: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{ports: [{{port: 80}}], {more}}}}}\n---\n"
    )
}

const SLICE: &str = "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.1.0.5]}]
";
