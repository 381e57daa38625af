//! A bearer token in a file, which another program replaces before it expires.
//!
//! In: the token file of a service account or a kubeconfig. Out: the `Authorization` header, read again about
//! once a minute.
//!
//! `kube` reads such files too, but takes a final newline for part of the token. Kubernetes' own clients do
//! not.

use std::{
    fs::File,
    io::{self, Read as _},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use http::HeaderValue;
use kube::config::AuthInfo;

/// How long a token is used before the file is read again.
const FRESH: Duration = Duration::from_secs(50);
/// The longest token; it is the limit of servers for all headers together.
const LONGEST: u64 = 1 << 20;

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum TokenError {
    #[error("the token file `{0}` cannot be read")]
    Read(PathBuf, #[source] io::Error),
    #[error("the token file `{0}` contains no usable token: {1}")]
    Unusable(PathBuf, &'static str),
}

/// A token file with its last content.
pub(super) struct Token {
    path: PathBuf,
    read: Mutex<(HeaderValue, Instant)>,
}

impl Token {
    /// Removes the token file from the settings of `kube`, if those would use it.
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

    /// The header of a request. If the file cannot be used any more, the previous token stays.
    pub(super) fn header(&self) -> HeaderValue {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if read.1.elapsed() >= FRESH {
            match header(&self.path) {
                Ok(token) => read.0 = token,
                Err(error) => tracing::debug!(%error, "using the previous token"),
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
    fn a_final_newline_is_removed_and_an_unusable_token_is_an_error() {
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
    fn a_file_is_read_again_and_a_deleted_one_leaves_the_previous_token() {
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
    fn other_credentials_go_before_the_file() {
        let mut both = AuthInfo { token: Some("inline".to_owned().into()), ..info("/nowhere".as_ref()) };
        assert!(Token::taken_from(&mut both).unwrap().is_none());
        assert!(both.token_file.is_some(), "kube applies its own order");
    }
}
