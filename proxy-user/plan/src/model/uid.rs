//! The uid of an object, which differs from that of a deleted object of the same name.
//!
//! In: `metadata.uid` as text. Out: its 16 bytes, because a node has tens of thousands of Services.

use std::fmt;

/// The uid of an object, without its dashes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uid([u8; 16]);

impl Uid {
    /// Parses a uid in the form in which API servers write it.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let digits: String = text.split('-').collect();
        let bytes = u128::from_str_radix(&digits, 16).ok()?.to_be_bytes();
        Some(Self(bytes)).filter(|uid| uid.to_string() == text)
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_uids_are_read() {
        for text in ["0b3c1f2e-0000-4abc-8def-00000000000a", "00000000-0000-0000-0000-000000000000"] {
            assert_eq!(Uid::read(text).unwrap().to_string(), text);
        }
        for text in ["", "n1", "0b3c1f2e00004abc8def00000000000a", "0B3C1F2E-0000-4abc-8def-00000000000a"] {
            assert_eq!(Uid::read(text), None, "{text}");
        }
    }
}
