//! The answers to names.

mod bytes;
mod endpoints;
mod large;
mod outside;
mod pipelined;
mod specification;

use hickory_proto::{
    op::ResponseCode,
    rr::{Name, Record, RecordType},
};

use super::{
    Zone,
    answer::{Answer, Resolution, answer},
    names::Names,
    question::Query,
};
use crate::model::Change;

/// The zone of the tests.
fn zone() -> Zone {
    Zone { domain: Name::from_ascii("cluster.local.").unwrap(), ttl: 5, pods: true, topology: false }
}

/// Names of the node `node-a` after these changes.
fn names(changes: impl IntoIterator<Item = Change>) -> Names {
    let mut names = Names::new("node-a");
    changes.into_iter().for_each(|change| names.apply(&change));
    names
}

fn resolve_in(names: &Names, zone: &Zone, name: &str, kind: RecordType, rotation: u32) -> Resolution {
    let name = Name::from_ascii(name).unwrap();
    let lower = name.to_lowercase();
    answer(names, zone, &Query { name: &name, lower: &lower, kind, rotation, most: 1000 })
}

fn resolve(names: &Names, name: &str, kind: &str) -> Resolution {
    resolve_in(names, &zone(), name, kind.parse().unwrap(), 0)
}

fn answered(names: &Names, name: &str, kind: &str) -> Answer {
    match resolve(names, name, kind) {
        Resolution::Answer(answer) => answer,
        other => panic!("{name} {kind}: {other:?}"),
    }
}

/// Records as text, sorted.
fn sorted(records: &[Record]) -> Vec<String> {
    let mut lines: Vec<String> = records.iter().map(ToString::to_string).collect();
    lines.sort_unstable();
    lines
}

/// The answers to a question as text, sorted; `NODATA`, `NXDOMAIN` or `elsewhere` if there are none.
fn lines(names: &Names, name: &str, kind: &str) -> Vec<String> {
    match resolve(names, name, kind) {
        Resolution::Answer(answer) if answer.answers.is_empty() => {
            assert_eq!(answer.authorities.len(), 1, "{name} {kind} has no SOA");
            let code = answer.code;
            vec![if code == ResponseCode::NXDomain { "NXDOMAIN" } else { "NODATA" }.to_owned()]
        }
        Resolution::Answer(answer) => sorted(&answer.answers),
        Resolution::Alias(aliases, target) => [sorted(&aliases), vec![format!("then {target}")]].concat(),
        Resolution::Elsewhere => vec!["elsewhere".to_owned()],
    }
}
