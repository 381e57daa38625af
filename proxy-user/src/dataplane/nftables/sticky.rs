//! A service port with session affinity, as it appears in names of chains and maps.
//!
//! In: a [`PortId`], whose parts users choose. Out: a text of bounded length that identifies this service port, and a
//! comment with the part that the text leaves out. A name with two pickers and this text stays below the kernel's 255
//! bytes.

use std::{
    cmp::Ordering,
    fmt::Write as _,
    hash::{Hash, Hasher},
    sync::Arc,
};

use sha2::{Digest as _, Sha256};

use crate::plan::PortId;

/// The most bytes of the text. The longest stem before it is a fork of two pickers with 99 bytes.
const MOST: usize = 144;

/// The most bytes of a comment that `nft` accepts when it loads a saved listing.
const MOST_OF_A_COMMENT: usize = 128;

/// The prefix of a hash. No name of Kubernetes has an underscore, so no full name equals a shortened one.
const HASHED: &str = "sha256_";

/// `/default/web/http/tcp`, or `/default/sha256_…/tcp` if that is too long.
#[derive(Clone, Debug)]
pub(super) struct Sticky {
    text: Arc<str>,
    /// The part that a shortened text leaves out; `None` also for a text that was read from a name.
    comment: Option<Arc<str>>,
}

impl Sticky {
    pub(super) fn of(id: &PortId) -> Self {
        let (namespace, service) = (id.service.namespace(), id.service.name());
        let port = if id.port.is_empty() { String::new() } else { format!("/{}", id.port) };
        let protocol = id.protocol.to_string().to_ascii_lowercase();
        let text = format!("/{namespace}/{service}{port}/{protocol}");
        if text.len() <= MOST {
            return Self { text: text.into(), comment: None };
        }
        let mut hash = String::new();
        for byte in &Sha256::digest(&text)[..16] {
            let _ = write!(hash, "{byte:02x}");
        }
        let room = MOST - HASHED.len() - hash.len() - protocol.len() - 3;
        let comment = format!("{service}{port}");
        Self {
            text: format!("/{}/{HASHED}{hash}/{protocol}", head(namespace, room)).into(),
            comment: Some(head(&comment, MOST_OF_A_COMMENT).into()),
        }
    }

    /// The end of a name, from its first slash on.
    pub(super) fn read(text: &str) -> Self {
        Self { text: text.into(), comment: None }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn comment(&self) -> Option<&str> {
        self.comment.as_deref()
    }
}

/// The first `most` bytes, or fewer, so that no character is cut.
fn head(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

impl PartialEq for Sticky {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Sticky {}

impl Hash for Sticky {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl PartialOrd for Sticky {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Sticky {
    fn cmp(&self, other: &Self) -> Ordering {
        self.text.cmp(&other.text)
    }
}
