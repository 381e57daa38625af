//! From the bytes of a query to the bytes of its reply.
//!
//! In: bytes from anywhere. Out: a reply, silence, or a [`Pending`] query that the upstream has to be asked first. Pure but
//! for the names, which are read under their lock. Reading and writing messages is hickory's; what is decided here
//! is which code a query gets that is none for us.

use std::{
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
};

use hickory_net::xfer::Protocol;
use hickory_proto::{
    op::{Header, Message, MessageType, Metadata, OpCode, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType},
    serialize::binary::{BinDecodable as _, BinDecoder},
};
use hickory_server::server::Request;

use super::names::Names;
use super::{
    answer::{self, Answer, Query, Resolution, Zone},
    encode::{SHORTEST_RECORD, encode, room},
    upstream::Outside,
};

/// More additional records than this no honest query has.
const MOST_ADDITIONALS: u16 = 4;

/// The names, written by the engine and read by queries.
pub type SharedNames = Arc<RwLock<Names>>;

/// Answers queries.
#[derive(Debug)]
pub struct Replier {
    names: SharedNames,
    zone: Zone,
    rotation: AtomicU32,
}

/// What becomes of a query.
#[derive(Debug)]
pub enum Reply {
    /// This is sent back.
    Now(Vec<u8>, ResponseCode),
    /// The upstream has to be asked.
    Later(Box<Pending>),
    /// Nothing is sent back.
    Silence,
}

/// A query that waits for the upstream.
#[derive(Debug)]
pub struct Pending {
    request: Request,
    /// Aliases found so far.
    aliases: Vec<Record>,
    /// What to ask the upstream.
    pub question: Outside,
}

impl Replier {
    /// Answers from these names.
    #[must_use]
    pub fn new(names: SharedNames, zone: Zone) -> Self {
        Self { names, zone, rotation: AtomicU32::new(0) }
    }

    /// The zone answered for.
    #[must_use]
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// What to do about the bytes of a query.
    #[must_use]
    pub fn reply(&self, bytes: &[u8], from: SocketAddr, protocol: Protocol) -> Reply {
        let Ok(header) = Header::read(&mut BinDecoder::new(bytes)) else {
            return unreadable(bytes, protocol);
        };
        if header.metadata.message_type != MessageType::Query {
            return unreadable(bytes, protocol);
        }
        if header.metadata.op_code != OpCode::Query {
            return bare(&header.metadata, ResponseCode::NotImp);
        }
        // Before anything is allocated by what the header claims.
        let counts = header.counts;
        let honest = counts.queries == 1
            && counts.answers == 0
            && counts.authorities <= 1
            && counts.additionals <= MOST_ADDITIONALS;
        if !honest {
            return bare(&header.metadata, ResponseCode::FormErr);
        }
        match Request::from_bytes(bytes.to_vec(), from, protocol) {
            Ok(request) => self.answer(request),
            Err(_) => bare(&header.metadata, ResponseCode::FormErr),
        }
    }

    /// A refusal of the query, whatever it is.
    #[must_use]
    pub fn refuse(bytes: &[u8]) -> Reply {
        match Header::read(&mut BinDecoder::new(bytes)) {
            Ok(header) if header.metadata.message_type == MessageType::Query => {
                bare(&header.metadata, ResponseCode::Refused)
            }
            _ => Reply::Silence,
        }
    }

    fn answer(&self, request: Request) -> Reply {
        let Some(asked) = request.queries.queries().first() else { return Reply::Silence };
        let kind = asked.query_type();
        if let Some(code) = unanswerable(&request, asked.query_class(), kind) {
            return now(&request, &Answer::without_records(code), false);
        }
        let query = Query {
            name: asked.original().name(),
            lower: asked.name(),
            kind,
            rotation: self.rotation.fetch_add(1, Ordering::Relaxed),
            most: usize::from(room(&request)) / SHORTEST_RECORD + 1,
        };
        let (resolution, are_known) = {
            let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
            (answer::answer(&names, &self.zone, &query), names.is_synced())
        };
        match resolution {
            // What is not known yet may exist. The client asks another server, or again.
            Resolution::Answer(_) | Resolution::Alias(..) if !are_known => {
                now(&request, &Answer::without_records(ResponseCode::ServFail), true)
            }
            Resolution::Answer(answer) => now(&request, &answer, true),
            // Whoever asks a stranger for everything gets nothing (RFC 8482).
            Resolution::Elsewhere if kind == RecordType::ANY => {
                now(&request, &Answer::without_records(ResponseCode::NotImp), true)
            }
            Resolution::Elsewhere => {
                let question = outside(&request, query.name.clone(), kind);
                Reply::Later(Box::new(Pending { request, aliases: Vec::new(), question }))
            }
            Resolution::Alias(aliases, target) => {
                let question = outside(&request, target, kind);
                Reply::Later(Box::new(Pending { request, aliases, question }))
            }
        }
    }
}

impl Pending {
    /// The reply, now that the upstream was asked; `None` when there is no upstream to ask.
    #[must_use]
    pub fn reply(mut self, upstream: Option<Answer>) -> Reply {
        let own = !self.aliases.is_empty();
        let mut answer = match upstream {
            Some(answer) => answer,
            // An alias of ours is right, whether or not any server knows what it leads to.
            None => Answer::without_records(if own { ResponseCode::NoError } else { ResponseCode::ServFail }),
        };
        // One client's case of letters is not another's, and clients may compare it.
        let asked = &self.question.name;
        answer.answers.iter_mut().filter(|record| record.name == *asked).for_each(|record| {
            record.name = asked.clone();
        });
        self.aliases.append(&mut answer.answers);
        answer.answers = self.aliases;
        answer.authoritative = own;
        answer.authentic &= !own;
        now(&self.request, &answer, true)
    }
}

/// The question as the upstream is asked it, with what the client set in its query.
fn outside(request: &Request, name: Name, kind: RecordType) -> Outside {
    Outside {
        name,
        kind,
        recursion: request.metadata.recursion_desired,
        authentic: request.metadata.authentic_data,
        unchecked: request.metadata.checking_disabled,
        edns: request.edns.is_some(),
        dnssec: request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
    }
}

/// The reply to what is no query. By UDP there is none, because a server that answers answers can be made to talk to
/// itself. By TCP a client waits for one, if there is at least the number that it would know it by.
fn unreadable(bytes: &[u8], protocol: Protocol) -> Reply {
    match (protocol, bytes.first_chunk::<2>()) {
        (Protocol::Tcp, Some(id)) => bare(
            &Metadata::new(u16::from_be_bytes(*id), MessageType::Query, OpCode::Query),
            ResponseCode::FormErr,
        ),
        _ => Reply::Silence,
    }
}

/// The code of a query that is no question about names.
fn unanswerable(request: &Request, class: DNSClass, kind: RecordType) -> Option<ResponseCode> {
    if request.version() > 0 {
        return Some(ResponseCode::BADVERS);
    }
    if class != DNSClass::IN {
        return Some(ResponseCode::Refused);
    }
    match kind {
        // Nobody gets all names at once.
        RecordType::AXFR | RecordType::IXFR => Some(ResponseCode::Refused),
        RecordType::OPT | RecordType::TSIG | RecordType::ZERO => Some(ResponseCode::FormErr),
        _ if !request.authorities.is_empty() => Some(ResponseCode::FormErr),
        _ => None,
    }
}

/// A header and nothing else.
fn bare(query: &Metadata, code: ResponseCode) -> Reply {
    let mut message = Message::error_msg(query.id, query.op_code, code);
    message.metadata.recursion_desired = query.recursion_desired;
    message.to_vec().map_or(Reply::Silence, |bytes| Reply::Now(bytes, code))
}

fn now(request: &Request, answer: &Answer, recursion: bool) -> Reply {
    let mut metadata = Metadata::response_from_request(&request.metadata);
    metadata.response_code = answer.code;
    metadata.authoritative = answer.authoritative;
    metadata.authentic_data = answer.authentic;
    metadata.recursion_available = recursion;
    encode(request, metadata, answer).map_or(Reply::Silence, |bytes| Reply::Now(bytes, answer.code))
}
