//! The bytes of a reply.
//!
//! In: the request, the reply's header and its records. Out: a message that is no longer than the request allows. Names,
//! headers and data are written by hickory; what is decided here is what stays out, and how the name of a record is
//! written that a record before it had. hickory looks for only so many names of a message, so that it would write a name
//! in full in each of the thousands of records that a large Service has.

use hickory_net::xfer::Protocol;
use hickory_proto::{
    ProtoError,
    op::{Edns, Header, HeaderCounts, Metadata},
    rr::{Name, Record},
    serialize::binary::{BinEncodable as _, BinEncoder},
};
use hickory_server::server::Request;

use super::answer::Answer;

/// The largest reply by UDP: what passes every link without being cut in pieces.
pub(super) const MOST_UDP: u16 = 1232;
/// The largest reply by UDP to a client that names no size.
const PLAIN_UDP: u16 = 512;
/// The shortest record there is, an address whose name was said before.
pub(super) const SHORTEST_RECORD: usize = 16;
/// The record of EDNS without options.
const EDNS_LEN: u16 = 11;
/// A name from this offset on cannot be pointed to.
const BEYOND_POINTERS: usize = 0x4000;
/// What tells a pointer from a label.
const POINTER: u16 = 0xc000;

/// How large the reply may be.
pub(super) fn room(request: &Request) -> u16 {
    match (request.protocol(), &request.edns) {
        (Protocol::Udp, Some(edns)) => edns.max_payload().clamp(PLAIN_UDP, MOST_UDP),
        (Protocol::Udp, None) => PLAIN_UDP,
        _ => u16::MAX,
    }
}

/// Writes the reply: with everything, else without what was not asked for, else as many answers as there is room for
/// beside the sign that some are missing.
pub(super) fn encode(request: &Request, mut metadata: Metadata, answer: &Answer) -> Option<Vec<u8>> {
    let question = request.queries.queries().first()?.original();
    let room = room(request);
    let mut bytes = Vec::with_capacity(usize::from(PLAIN_UDP));
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(room - request.edns.as_ref().map_or(0, |_| EDNS_LEN));
    let header = encoder.place::<Header>().ok()?;
    let at = encoder.offset();
    question.emit(&mut encoder).ok()?;

    let mut writer = Writer { encoder, known: Some((question.name(), at)) };
    let answers = writer.section(&answer.answers)?;
    let authorities = if answers.is_whole { writer.section(&answer.authorities)? } else { Section::NONE };
    let is_cut = !answers.is_whole || !authorities.is_whole;
    let additionals = if is_cut { Section::NONE } else { writer.section_or_nothing(&answer.additionals)? };

    let mut encoder = writer.encoder;
    let mut counts = HeaderCounts {
        queries: 1,
        answers: answers.records,
        authorities: authorities.records,
        additionals: additionals.records,
    };
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MOST_UDP).set_dnssec_ok(asked.flags().dnssec_ok);
        edns.set_rcode_high(metadata.response_code.high());
        encoder.set_max_size(room);
        Record::from(&edns).emit(&mut encoder).ok()?;
        counts.additionals += 1;
    }
    metadata.truncation = is_cut;
    header.replace(&mut encoder, Header { metadata, counts }).ok()?;
    drop(encoder);
    Some(bytes)
}

/// How much of a section there was room for.
struct Section {
    records: u16,
    is_whole: bool,
}

impl Section {
    const NONE: Self = Self { records: 0, is_whole: true };
}

/// Writes records, each of them whole or not at all.
struct Writer<'bytes, 'records> {
    encoder: BinEncoder<'bytes>,
    /// The name written last that can be pointed to, and where it is.
    known: Option<(&'records Name, usize)>,
}

impl<'records> Writer<'_, 'records> {
    /// As many of the records as there is room for. Nothing when one of them cannot be written at all.
    fn section(&mut self, records: &'records [Record]) -> Option<Section> {
        let mut written = 0;
        for record in records {
            let (start, known) = (self.encoder.offset(), self.known);
            match self.record(record) {
                Ok(()) => written += 1,
                Err(ProtoError::MaxBufferSizeExceeded(_)) => {
                    self.back_to(start, known);
                    return Some(Section { records: written, is_whole: false });
                }
                Err(_) => return None,
            }
        }
        Some(Section { records: written, is_whole: true })
    }

    /// All of the records, or none of them.
    fn section_or_nothing(&mut self, records: &'records [Record]) -> Option<Section> {
        let (start, known) = (self.encoder.offset(), self.known);
        let section = self.section(records)?;
        if section.is_whole {
            return Some(section);
        }
        self.back_to(start, known);
        Some(Section::NONE)
    }

    fn back_to(&mut self, start: usize, known: Option<(&'records Name, usize)>) {
        self.encoder.set_offset(start);
        self.encoder.trim();
        self.known = known;
    }

    fn record(&mut self, record: &'records Record) -> Result<(), ProtoError> {
        let encoder = &mut self.encoder;
        match self.known.filter(|(known, _)| known.eq_case(&record.name)) {
            Some((_, at)) => encoder.emit_u16(POINTER | at as u16)?,
            None => {
                let at = encoder.offset();
                record.name.emit(encoder)?;
                if at < BEYOND_POINTERS {
                    self.known = Some((&record.name, at));
                }
            }
        }
        record.record_type().emit(encoder)?;
        record.dns_class.emit(encoder)?;
        encoder.emit_u32(record.ttl)?;
        let place = encoder.place::<u16>()?;
        record.data.emit(encoder)?;
        let len = encoder.len_since_place(&place);
        place.replace(encoder, len as u16)
    }
}
