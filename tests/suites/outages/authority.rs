//! An authority that signs certificates, by openssl.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// Elliptic keys are made in no time.
const KEY: [&str; 6] = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];

pub(crate) struct Authority(TempDir);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let authority = Self(tempfile::tempdir().unwrap());
        openssl(&authority.path("key"), &authority.path("certificate"), &["-subj", &format!("/CN={name}")]);
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn certificate(&self) -> String {
        std::fs::read_to_string(self.path("certificate")).unwrap()
    }

    /// Signs a certificate for this subject at loopback, and replaces both files.
    pub(crate) fn sign(&self, subject: &str, [certificate, key]: &[PathBuf; 2]) {
        let [signer, signing] = ["certificate", "key"].map(|name| self.path(name).display().to_string());
        let draft = self.path("draft");
        let draft_key = self.path("draft-key");
        let terms =
            ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"];
        openssl(
            &draft_key,
            &draft,
            &[&["-subj", subject, "-CA", &signer, "-CAkey", &signing], &terms[..]].concat(),
        );
        let chain = std::fs::read_to_string(&draft).unwrap() + &self.certificate();
        put(key, &std::fs::read_to_string(&draft_key).unwrap());
        put(certificate, &chain);
    }
}

fn openssl(key: &Path, certificate: &Path, more: &[&str]) {
    let mut openssl = Command::new("openssl");
    openssl
        .args(KEY)
        .args(["-nodes", "-days", "2", "-keyout"])
        .arg(key)
        .arg("-out")
        .arg(certificate)
        .args(more);
    let output = openssl.output().expect("openssl can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Writes a file that may be read meanwhile.
pub(crate) fn put(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text).unwrap();
    std::fs::rename(draft, path).unwrap();
}
