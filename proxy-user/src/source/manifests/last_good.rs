//! Stores the last valid text of each manifest file on disk.
//!
//! In: the text of a valid file. Out: that text, for an agent that starts while the file has errors. So the
//! last valid content stays in force over a restart.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use tracing::{debug, warn};

/// The directory of the stored texts.
#[derive(Debug)]
pub(super) struct LastGood {
    directory: Option<PathBuf>,
    /// Whether a failure to store was logged.
    warned: bool,
}

impl LastGood {
    /// Stores in this directory, or nowhere.
    pub(super) const fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, warned: false }
    }

    /// The last valid text of a file, if it is stored.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let path = self.directory.as_ref()?.join(name);
        let text = fs::read_to_string(&path);
        text.inspect_err(|error| debug!(file = %path.display(), %error, "no stored text of a manifest file"))
            .ok()
    }

    /// Stores the text of a file. Returns false if that failed.
    pub(super) fn store(&mut self, name: &str, text: &str) -> bool {
        let Some(directory) = &self.directory else { return true };
        let Err(error) = write(directory, name, text) else {
            self.warned = false;
            return true;
        };
        if !std::mem::replace(&mut self.warned, true) {
            warn!(
                directory = %directory.display(), %error,
                "cannot store manifest files; a restart loses the objects of files that have errors then"
            );
        }
        false
    }

    /// Removes the texts of all other files.
    pub(super) fn retain(&self, names: &BTreeSet<String>) {
        let Some(directory) = &self.directory else { return };
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        for entry in
            entries.filter(|entry| !entry.file_name().to_str().is_some_and(|name| names.contains(name)))
        {
            if let Err(error) = fs::remove_file(entry.path()) {
                debug!(file = %entry.path().display(), %error, "cannot remove the stored text of a manifest file");
            }
        }
    }
}

/// Writes a temporary file and renames it, so that a crash leaves either the old text or the new one.
fn write(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    let path = directory.join(name);
    if fs::read(&path).is_ok_and(|known| known == text.as_bytes()) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    let temporary = directory.join(".new");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

/// The directory next to a status file.
pub(super) fn next_to(status_file: &Path) -> PathBuf {
    let name = status_file.file_name().and_then(OsStr::to_str).unwrap_or_default();
    status_file.with_file_name(format!(".{name}.last-good"))
}
