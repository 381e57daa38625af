//! The text that each file last said rightly, kept on disk.
//!
//! In: the text of a file that is right. Out: that text, for an agent that starts while the file is wrong: what it said
//! before is programmed and stays in force, also over a restart.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
};

use tracing::{debug, warn};

/// Where the text of files is kept.
#[derive(Debug)]
pub(super) struct Kept {
    directory: Option<PathBuf>,
    /// Whether it was said already that nothing can be kept.
    complained: bool,
}

impl Kept {
    /// Keeps text in this directory, or nowhere.
    pub(super) const fn new(directory: Option<PathBuf>) -> Self {
        Self { directory, complained: false }
    }

    /// What a file last said rightly, if that is known.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let path = self.directory.as_ref()?.join(name);
        let text = fs::read_to_string(&path);
        text.inspect_err(|error| debug!(file = %path.display(), %error, "nothing is kept of a manifest file"))
            .ok()
    }

    /// Keeps what a file says. Answers whether that could be done, or need not be.
    pub(super) fn keep(&mut self, name: &str, text: &str) -> bool {
        let Some(directory) = &self.directory else { return true };
        let Err(error) = write(directory, name, text) else {
            self.complained = false;
            return true;
        };
        if !std::mem::replace(&mut self.complained, true) {
            warn!(
                directory = %directory.display(), %error,
                "cannot keep what manifest files say; a restart will forget it for files that are wrong then"
            );
        }
        false
    }

    /// Forgets the files that are not among these.
    pub(super) fn retain(&self, names: &BTreeSet<String>) {
        let Some(directory) = &self.directory else { return };
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        for entry in
            entries.filter(|entry| !entry.file_name().to_str().is_some_and(|name| names.contains(name)))
        {
            if let Err(error) = fs::remove_file(entry.path()) {
                debug!(file = %entry.path().display(), %error, "cannot forget a manifest file");
            }
        }
    }
}

/// Writes beside the file and renames, so that a crash leaves the old text or the new one.
fn write(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    let path = directory.join(name);
    if fs::read(&path).is_ok_and(|known| known == text.as_bytes()) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    let beside = directory.join(".new");
    fs::write(&beside, text)?;
    fs::rename(&beside, path)
}

/// The place beside a status file.
pub(super) fn beside(status_file: &Path) -> PathBuf {
    let name = status_file.file_name().and_then(OsStr::to_str).unwrap_or_default();
    status_file.with_file_name(format!(".{name}.last-good"))
}
