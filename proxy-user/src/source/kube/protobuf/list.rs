//! Splits the bytes of a list into its objects as they arrive, so that the list is never in memory as a
//! whole.
//!
//! In: the bytes of a response. Out: the list's resource version, then each item's message.
//!
//! ```text
//! "k8s\0" Unknown { 1: types, 2: raw = List { 1: metadata, 2: item, 2: item … }, 3: …, 4: … }
//! ```

use std::io;

use bytes::{Buf as _, Bytes, BytesMut};
use prost::{
    Message as _,
    encoding::{WireType, decode_key, decode_varint},
};
use tokio_util::codec::Decoder;

use super::{LARGEST, MAGIC, Unreadable, message, object::text};

/// A part of a list.
pub(super) enum Part {
    /// The resource version of the list.
    Version(String),
    /// The message of an object.
    Item(Bytes),
}

/// The position of the next byte.
#[derive(Clone, Copy)]
enum Position {
    Magic,
    /// Between the fields around the list, before it.
    Before,
    /// Between the fields of the list, which has this many bytes left.
    Inside(usize),
    /// Between the fields around the list, after it.
    Behind,
}

/// Decodes a list into its parts.
pub(super) struct Parts(Position);

impl Parts {
    pub(super) const fn new() -> Self {
        Self(Position::Magic)
    }

    /// Whether the bytes so far are a complete list.
    const fn is_whole(&self) -> bool {
        matches!(self.0, Position::Behind)
    }
}

/// The number of the next field, the length of its key and length prefix, and the length of its content.
/// `None` if more bytes are needed. Every field around and in a list has a length prefix.
fn field(bytes: &[u8]) -> Result<Option<(u32, usize, usize)>, Unreadable> {
    /// A key of one to five bytes, and a length of one to ten.
    const LONGEST: usize = 15;
    let mut rest = bytes;
    let read = decode_key(&mut rest).and_then(|(tag, wire)| Ok((tag, wire, decode_varint(&mut rest)?)));
    match read {
        Ok((tag, WireType::LengthDelimited, length)) => {
            let length = usize::try_from(length).map_err(|_| Unreadable::List)?;
            Ok(Some((tag, bytes.len() - rest.len(), length)))
        }
        Ok(_) => Err(Unreadable::List),
        Err(_) if bytes.len() < LONGEST => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Takes a complete field out of the buffer.
fn take(bytes: &mut BytesMut, head: usize, length: usize) -> Result<Option<Bytes>, Unreadable> {
    if length > LARGEST {
        return Err(Unreadable::List);
    }
    if bytes.len() < head + length {
        bytes.reserve(head + length - bytes.len());
        return Ok(None);
    }
    bytes.advance(head);
    Ok(Some(bytes.split_to(length).freeze()))
}

impl Decoder for Parts {
    type Item = Part;
    type Error = Unreadable;

    fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Part>, Unreadable> {
        loop {
            if let Position::Magic = self.0 {
                let Some(begin) = bytes.get(..MAGIC.len()) else { return Ok(None) };
                if begin != MAGIC {
                    return Err(Unreadable::Magic);
                }
                bytes.advance(MAGIC.len());
                self.0 = Position::Before;
            }
            if let Position::Inside(0) = self.0 {
                self.0 = Position::Behind;
            }
            let Some((tag, head, length)) = field(bytes)? else { return Ok(None) };
            match (self.0, tag) {
                (Position::Before, 2) => {
                    bytes.advance(head);
                    self.0 = Position::Inside(length);
                }
                (Position::Magic | Position::Before | Position::Behind, _) => {
                    if take(bytes, head, length)?.is_none() {
                        return Ok(None);
                    }
                }
                (Position::Inside(left), _) => {
                    let left = left.checked_sub(head).and_then(|left| left.checked_sub(length));
                    let left = left.ok_or(Unreadable::List)?;
                    let Some(contents) = take(bytes, head, length)? else { return Ok(None) };
                    self.0 = Position::Inside(left);
                    match tag {
                        1 => {
                            let metadata = message::ListMetadata::decode(contents)?;
                            return Ok(Some(Part::Version(text(&metadata.resource_version))));
                        }
                        2 => return Ok(Some(Part::Item(contents))),
                        _ => {}
                    }
                }
            }
        }
    }

    fn decode_eof(&mut self, bytes: &mut BytesMut) -> Result<Option<Part>, Unreadable> {
        match self.decode(bytes)? {
            None if bytes.is_empty() && self.is_whole() => Ok(None),
            None => Err(Unreadable::Io(io::ErrorKind::UnexpectedEof.into())),
            part => Ok(part),
        }
    }
}
