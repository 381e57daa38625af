//! The token in a file, which another program replaces before it expires.
//!
//! In: the file of a service account or a kubeconfig. Out: what requests carry of it, read anew about once a minute.
//!
//! `kube` reads such files too, and takes a line's end for part of the token, which Kubernetes' own clients do not.

use std::{
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::HeaderValue;
use kube::config::AuthInfo;

/// For how long a token is used before the file is read again.
const FRESH: Duration = Duration::from_secs(50);
/// Longer tokens are none: a server's limit for all headers together.
const LONGEST: u64 = 1 << 20;

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokenError {
    #[error("the token file `{0}` cannot be read")]
    Read(PathBuf, #[source] io::Error),
    #[error("the token file `{0}` holds no token: {1}")]
    Unusable(PathBuf, &'static str),
}

/// A token in a file.
pub(super) struct Token {
    path: PathBuf,
    read: Mutex<(HeaderValue, Instant)>,
}

impl Token {
    /// Takes the file out of what `kube` would look at, if it is what counts there.
    ///
    /// # Errors
    ///
    /// When the file cannot be used now.
    pub(super) fn taken_from(info: &mut AuthInfo) -> Result<Option<Self>, TokenError> {
        let another = info.token.is_some() || info.auth_provider.is_some() || info.username.is_some();
        let Some(path) = info.token_file.take_if(|_| !another).map(PathBuf::from) else { return Ok(None) };
        let read = Mutex::new((header(&path)?, Instant::now()));
        Ok(Some(Self { path, read }))
    }

    /// What a request carries. A file that cannot be used any more leaves the token before.
    pub(super) fn header(&self) -> HeaderValue {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.1.elapsed() >= FRESH {
            match header(&self.path) {
                Ok(token) => read.0 = token,
                Err(error) => tracing::debug!(%error, "the token before is used"),
            }
            read.1 = Instant::now();
        }
        read.0.clone()
    }
}

fn header(path: &PathBuf) -> Result<HeaderValue, TokenError> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text));
    read.map_err(|error| TokenError::Read(path.clone(), error))?;
    let unusable = |why| TokenError::Unusable(path.clone(), why);
    let token = match text.trim() {
        "" => return Err(unusable("it is empty")),
        _ if text.len() as u64 > LONGEST => return Err(unusable("it is longer than a mebibyte")),
        token => token,
    };
    let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| unusable("it has characters that no HTTP header can carry"))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn info(path: &std::path::Path) -> AuthInfo {
        AuthInfo { token_file: Some(path.display().to_string()), ..AuthInfo::default() }
    }

    #[test]
    fn a_token_has_no_end_of_line_and_what_is_none_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["abc", "abc\n", "abc\r\n", " abc \n\n"] {
            fs::write(file.path(), text).unwrap();
            let token = Token::taken_from(&mut info(file.path())).unwrap().unwrap();
            assert_eq!(token.header(), "Bearer abc");
        }
        for (text, why) in
            [("", "empty"), (" \n", "empty"), ("a\nb", "characters"), (&*"a".repeat(2 << 20), "mebibyte")]
        {
            fs::write(file.path(), text).unwrap();
            let error = Token::taken_from(&mut info(file.path())).err().unwrap().to_string();
            assert!(error.contains(why) && error.contains(file.path().to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_file_is_read_anew_and_one_that_is_gone_leaves_the_token_before() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "old").unwrap();
        let token = Token::taken_from(&mut info(file.path())).unwrap().unwrap();
        let age = || token.read.lock().unwrap().1 -= FRESH;
        fs::write(file.path(), "new").unwrap();
        assert_eq!(token.header(), "Bearer old", "it is fresh");
        age();
        assert_eq!(token.header(), "Bearer new");
        file.close().unwrap();
        age();
        assert_eq!(token.header(), "Bearer new");
    }

    #[test]
    fn other_credentials_count_before_the_file() {
        let mut both = AuthInfo { token: Some("inline".to_owned().into()), ..info("/nowhere".as_ref()) };
        assert!(Token::taken_from(&mut both).unwrap().is_none());
        assert!(both.token_file.is_some(), "kube knows what comes first");
    }
}
