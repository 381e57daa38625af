//! The bytes of a reply.
//!
//! In: the request, the reply's header and its records. Out: a message that is no longer than the request allows.
//! hickory writes names, headers and data. This file chooses which records stay out, and writes a pointer for a
//! record's name if an earlier record has the same name. hickory compresses only the first names of a message, so it
//! would repeat the full name in each of a large Service's thousands of records.

use hickory_net::xfer::Protocol;
use hickory_proto::{
    ProtoError,
    op::{Edns, Header, HeaderCounts, Metadata},
    rr::{Name, Record},
    serialize::binary::{BinEncodable as _, BinEncoder},
};
use hickory_server::server::Request;

use super::answer::Answer;

/// The largest reply by UDP, which passes every link without fragmentation.
pub(super) const MOST_UDP: u16 = 1232;
/// The largest reply by UDP to a client without EDNS.
const PLAIN_UDP: u16 = 512;
/// The length of the shortest record: an A record with a pointer for its name.
pub(super) const SHORTEST_RECORD: usize = 16;
/// The length of the EDNS record without options.
const EDNS_LEN: u16 = 11;
/// Pointers reach only names before this offset.
const BEYOND_POINTERS: usize = 0x4000;
/// The two bits that mark a pointer.
const POINTER: u16 = 0xc000;

/// The maximum size of the reply.
pub(super) fn room(request: &Request) -> u16 {
    match (request.protocol(), &request.edns) {
        (Protocol::Udp, Some(edns)) => edns.max_payload().clamp(PLAIN_UDP, MOST_UDP),
        (Protocol::Udp, None) => PLAIN_UDP,
        _ => u16::MAX,
    }
}

/// Writes the reply. If there is too little room, it first leaves out the additional records, and then truncates the
/// answers and sets TC.
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

/// How many records of a section had room.
struct Section {
    records: u16,
    is_whole: bool,
}

impl Section {
    const NONE: Self = Self { records: 0, is_whole: true };
}

/// Writes records, each completely or not at all.
struct Writer<'bytes, 'records> {
    encoder: BinEncoder<'bytes>,
    /// The last name within reach of pointers, and its offset.
    known: Option<(&'records Name, usize)>,
}

impl<'records> Writer<'_, 'records> {
    /// Writes as many records as there is room for. `None` when a record cannot be encoded.
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

    /// Writes all records, or none of them.
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
