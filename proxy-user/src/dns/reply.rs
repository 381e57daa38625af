//! From the bytes of a query to the bytes of its reply.
//!
//! In: untrusted bytes. Out: a reply, silence, or a [`Pending`] query that has to be forwarded first. Pure except for
//! the names, which are read under their lock. hickory parses and writes messages; this file chooses the response
//! code of queries that weir does not answer.

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
    answer::{self, Answer, Resolution, Zone},
    encode::{SHORTEST_RECORD, encode, room},
    question::Query,
    upstream::UpstreamQuestion,
};

/// The most additional records of a query that weir parses.
const MOST_ADDITIONALS: u16 = 4;

/// The names, written by the engine and read by queries.
pub(crate) type SharedNames = Arc<RwLock<Names>>;

/// Answers queries from the names.
#[derive(Debug)]
pub(crate) struct Replier {
    names: SharedNames,
    zone: Zone,
    rotation: AtomicU32,
}

/// The result of a query.
#[derive(Debug)]
pub(crate) enum Reply {
    /// A message to send, and its code.
    Now(Vec<u8>, ResponseCode),
    /// The query has to be forwarded first.
    Later(Box<Pending>),
    /// The client gets no reply.
    Silence,
}

/// A query that waits for the upstream.
#[derive(Debug)]
pub(crate) struct Pending {
    request: Request,
    /// CNAME records of the cluster that led to the question.
    aliases: Vec<Record>,
    pub(crate) question: UpstreamQuestion,
}

impl Replier {
    /// Answers from `names`, with the settings of `zone`.
    #[must_use]
    pub(crate) fn new(names: SharedNames, zone: Zone) -> Self {
        Self { names, zone, rotation: AtomicU32::new(0) }
    }

    /// Answers the bytes of a query, or returns it to be forwarded.
    #[must_use]
    pub(crate) fn reply(&self, bytes: &[u8], from: SocketAddr, protocol: Protocol) -> Reply {
        let Ok(header) = Header::read(&mut BinDecoder::new(bytes)) else {
            return unreadable(bytes, protocol);
        };
        if header.metadata.message_type != MessageType::Query {
            return unreadable(bytes, protocol);
        }
        if header.metadata.op_code != OpCode::Query {
            return bare(&header.metadata, ResponseCode::NotImp);
        }
        // Checked before parsing, which allocates by the counts in the header.
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

    /// Refuses a query without parsing its question.
    #[must_use]
    pub(crate) fn refuse(bytes: &[u8]) -> Reply {
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
            // The name may exist although weir does not know it yet. The client asks another server, or again.
            Resolution::Answer(_) | Resolution::Alias(..) if !are_known => {
                now(&request, &Answer::without_records(ResponseCode::ServFail), true)
            }
            Resolution::Answer(answer) => now(&request, &answer, true),
            // weir does not forward ANY (RFC 8482).
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
    /// The reply, with the upstream's answer; `None` means that there is no upstream.
    #[must_use]
    pub(crate) fn reply(mut self, upstream: Option<Answer>) -> Reply {
        let own = !self.aliases.is_empty();
        let mut answer = match upstream {
            Some(answer) => answer,
            // The cluster's alias is right even if no server can resolve its target.
            None => Answer::without_records(if own { ResponseCode::NoError } else { ResponseCode::ServFail }),
        };
        // The cached answer may have another case of letters, and clients may compare it with their question.
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

/// The question for the upstream, with the bits that the client set in its query.
fn outside(request: &Request, name: Name, kind: RecordType) -> UpstreamQuestion {
    UpstreamQuestion {
        name,
        kind,
        recursion: request.metadata.recursion_desired,
        authentic: request.metadata.authentic_data,
        unchecked: request.metadata.checking_disabled,
        edns: request.edns.is_some(),
        dnssec: request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
    }
}

/// The reply to bytes that are no query. By UDP there is none, because an attacker could make two servers that answer
/// responses talk to each other. By TCP a client waits for a reply, so it gets one if its message has at least an id.
fn unreadable(bytes: &[u8], protocol: Protocol) -> Reply {
    match (protocol, bytes.first_chunk::<2>()) {
        (Protocol::Tcp, Some(id)) => bare(
            &Metadata::new(u16::from_be_bytes(*id), MessageType::Query, OpCode::Query),
            ResponseCode::FormErr,
        ),
        _ => Reply::Silence,
    }
}

/// The code for a query that weir does not answer by name; `None` for all other queries.
fn unanswerable(request: &Request, class: DNSClass, kind: RecordType) -> Option<ResponseCode> {
    if request.version() > 0 {
        return Some(ResponseCode::BADVERS);
    }
    if class != DNSClass::IN {
        return Some(ResponseCode::Refused);
    }
    match kind {
        // weir allows no zone transfers.
        RecordType::AXFR | RecordType::IXFR => Some(ResponseCode::Refused),
        RecordType::OPT | RecordType::TSIG | RecordType::ZERO => Some(ResponseCode::FormErr),
        _ if !request.authorities.is_empty() => Some(ResponseCode::FormErr),
        _ => None,
    }
}

/// A message that has a header only.
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
