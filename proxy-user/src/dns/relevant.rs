//! Keeps those records of an upstream's response that answer the question.
//!
//! In: the question and the response. Out: an [`Answer`] with the records of the name and of its aliases' targets,
//! their signatures, and the SOA and denials. Records about the cluster's own names are dropped.

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType},
};

use super::{answer::Answer, question, upstream::UpstreamQuestion};

/// The records of a response that belong to the question.
pub(super) fn relevant(question: &UpstreamQuestion, response: Message, domain: &Name) -> Answer {
    let owners = owners(question, &response.answers, domain);
    let concerns = |record: &Record| match record.record_type() {
        // A DNAME redirects all names below its own.
        RecordType::DNAME => is_above(&record.name, &owners, domain),
        RecordType::RRSIG => {
            owners.contains(&record.name) || (covers_dname(record) && is_above(&record.name, &owners, domain))
        }
        RecordType::CNAME => owners.contains(&record.name),
        kind => kind == question.kind && owners.contains(&record.name),
    };
    let last = owners.last().unwrap_or(&question.name);
    let explains = |record: &Record| match record.record_type() {
        _ if is_ours(&record.name, domain) => false,
        RecordType::SOA => record.name.zone_of(last),
        RecordType::NSEC | RecordType::NSEC3 | RecordType::RRSIG => true,
        _ => false,
    };
    Answer {
        authentic: response.metadata.authentic_data,
        answers: response.answers.into_iter().filter(concerns).collect(),
        authorities: response.authorities.into_iter().filter(explains).collect(),
        ..Answer::without_records(response.metadata.response_code)
    }
}

/// The question's name and its aliases' targets, without the cluster's own names.
fn owners(question: &UpstreamQuestion, answers: &[Record], domain: &Name) -> Vec<Name> {
    let mut owners = vec![question.name.clone()];
    if is_ours(&question.name, domain) {
        owners.clear();
    }
    while let Some(at) = owners.last() {
        let target = answers.iter().find_map(|record| match &record.data {
            RData::CNAME(target) if record.name == *at => Some(target.0.clone()),
            _ => None,
        });
        match target {
            Some(target)
                if question.kind != RecordType::CNAME
                    && !owners.contains(&target)
                    && !is_ours(&target, domain) =>
            {
                owners.push(target);
            }
            _ => break,
        }
    }
    owners
}

fn is_ours(name: &Name, domain: &Name) -> bool {
    question::below(&name.to_lowercase(), domain).is_some()
}

fn is_above(name: &Name, owners: &[Name], domain: &Name) -> bool {
    owners.iter().any(|owner| name.zone_of(owner)) && !name.zone_of(domain) && !is_ours(name, domain)
}

/// Whether a signature covers a DNAME. hickory gives only its bytes.
fn covers_dname(signature: &Record) -> bool {
    match &signature.data {
        RData::Unknown { rdata, .. } => {
            rdata.anything.starts_with(&u16::from(RecordType::DNAME).to_be_bytes())
        }
        _ => false,
    }
}

/// How long an answer may be cached, in seconds; `None` if it may not.
pub(super) fn lifetime(kind: RecordType, answer: &Answer) -> Option<u32> {
    if !matches!(answer.code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return None;
    }
    let shortest = answer.answers.iter().map(|record| record.ttl).min();
    if answer.answers.iter().any(|record| record.record_type() == kind) {
        return shortest;
    }
    // The SOA limits how long a negative answer may be cached (RFC 2308).
    let nothing = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    })?;
    Some(shortest.unwrap_or(nothing).min(nothing))
}
