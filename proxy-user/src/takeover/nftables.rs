//! Reads all rules of an nf_tables family, and deletes kube-proxy's part in one transaction.
//!
//! In: nf_tables' messages. Out: [`FamilyRules`], and one batch that deletes a [`Removal`].

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkPayload, Nla as _};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, ExpressionAttribute, Expressions, Immediate,
        ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
        Verdict as Code, VerdictAttribute,
    },
    none::ControlMessage,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::sys::netlink::{Channel, messages, netfilter, serialize};

use super::{
    Error,
    chains::{self, Chain, FamilyRules, Name, Policy, Removal, Rule, Verdict},
};

/// The families that kube-proxy writes to, with nft's names.
pub(super) const FAMILIES: [(NetfilterProtoFamily, &str); 2] =
    [(NetfilterProtoFamily::IPv4, "ip"), (NetfilterProtoFamily::IPv6, "ip6")];

/// The number of nf_tables among netfilter's subsystems.
const NF_TABLES: u16 = 10;
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;
/// `NFTA_TARGET_NAME`, of an iptables target.
const TARGET_NAME: u16 = 1;
/// After this many changes of the rules by other programs, weir gives up.
const ATTEMPTS: usize = 20;

/// Removes kube-proxy's part of a family's rules. Returns what was removed and what stays.
///
/// # Errors
///
/// The kernel's, also if other programs keep changing the rules.
pub(super) fn remove(family: NetfilterProtoFamily, name: &'static str) -> Result<Removal, Error> {
    let error = |what| move |source| Error::RuleSet { what, family: name, source };
    let mut rules = RuleSet::open().map_err(Error::Socket)?;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let removal = chains::of_kube_proxy(&rules.read(family).map_err(error("read the rules"))?);
        match rules.remove(family, &removal) {
            Ok(()) => return Ok(removal),
            // Another program added a rule to one of the chains, or removed one of them, since weir read the rules.
            Err(changed) if attempts < ATTEMPTS && is_change(&changed) => {}
            Err(source) => return Err(error("remove the rules")(source)),
        }
    }
}

fn is_change(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT))
}

/// A netlink socket for nf_tables.
struct RuleSet(Channel);

impl RuleSet {
    fn open() -> io::Result<Self> {
        Channel::open(NETLINK_NETFILTER).map(Self)
    }

    /// Tables, chains and rules of a family.
    fn read(&mut self, family: NetfilterProtoFamily) -> io::Result<FamilyRules> {
        let tables = NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() });
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let rules = NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() });
        Ok(FamilyRules {
            tables: self.dump(family, &tables, table)?,
            chains: self.dump(family, &chains, chain)?,
            rules: self.dump(family, &rules, rule)?,
        })
    }

    /// Converts each message of a dump with `read`, and keeps nothing else, because a node can have 100,000 rules.
    fn dump<T>(
        &mut self,
        family: NetfilterProtoFamily,
        request: &NfTablesMessage,
        read: impl Fn(NfTablesMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..ATTEMPTS {
            self.0.send(&serialize(&[netfilter(NLM_F_REQUEST | NLM_F_DUMP, family, 0, request.clone())]))?;
            if let Some(all) = self.answer(&read)? {
                return Ok(all);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EINTR))
    }

    /// The response to a dump; `None` if the rules changed meanwhile.
    fn answer<T>(&mut self, read: impl Fn(NfTablesMessage) -> Option<T>) -> io::Result<Option<Vec<T>>> {
        let (mut all, mut interrupted) = (Vec::new(), false);
        loop {
            for message in messages::<NetfilterMessage>(self.0.receive()?) {
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(all)),
                    NetlinkPayload::Error(error) => match -error.raw_code() {
                        libc::EINTR => return Ok(None),
                        errno => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    NetlinkPayload::InnerMessage(message) => {
                        if let NetfilterMessageInner::NfTables(message) = message.inner {
                            all.extend(read(message));
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Deletes in one batch, which succeeds or fails as a whole.
    fn remove(&mut self, family: NetfilterProtoFamily, removal: &Removal) -> io::Result<()> {
        let deletions = deletions(removal);
        if deletions.is_empty() {
            return Ok(());
        }
        let control =
            |what: ControlMessage| netfilter(NLM_F_REQUEST, NetfilterProtoFamily::Unspec, NF_TABLES, what);
        let mut batch = vec![control(ControlMessage::BatchBegin)];
        batch.extend(deletions.into_iter().map(|deletion| netfilter(NLM_F_REQUEST, family, 0, deletion)));
        batch.push(control(ControlMessage::BatchEnd));
        let batch = serialize(&batch);
        self.0.make_room(batch.len())?;
        self.0.send(&batch)?;
        self.first_error()
    }

    /// The first error that the kernel reported. `send` returns after the kernel has processed the batch, so all
    /// responses are there. Reads all of them, because the next request uses the same socket.
    fn first_error(&mut self) -> io::Result<()> {
        let mut first = Ok(());
        while let Some(datagram) = self.0.receive_ready()? {
            for message in messages::<NetfilterMessage>(datagram) {
                if let NetlinkPayload::Error(error) = message.payload
                    && error.raw_code() != 0
                    && first.is_ok()
                {
                    first = Err(io::Error::from_raw_os_error(-error.raw_code()));
                }
            }
        }
        first
    }
}

/// The deletions in order: rules that jump to a chain, rules in it, the chain itself, tables.
fn deletions(removal: &Removal) -> Vec<NfTablesMessage> {
    let rule = |(table, chain): &Name, handle: Option<u64>| {
        let mut attributes = vec![RuleAttribute::Table(table.clone()), RuleAttribute::Chain(chain.clone())];
        attributes.extend(handle.map(RuleAttribute::Handle));
        NfTablesMessage::DeleteRule(RuleMessage { attributes })
    };
    let chain = |(table, chain): &Name| {
        let attributes = vec![ChainAttribute::Table(table.clone()), ChainAttribute::Name(chain.clone())];
        NfTablesMessage::DeleteChain(ChainMessage { attributes })
    };
    let table = |name: &String| {
        let attributes = vec![TableAttribute::Name(name.clone())];
        NfTablesMessage::DeleteTable(TableMessage { attributes })
    };
    let single = removal.rules.iter().map(|(chain, handle)| rule(chain, Some(*handle)));
    let rules = removal.chains.iter().map(|chain| rule(chain, None));
    let chains = removal.chains.iter().map(chain);
    single.chain(rules).chain(chains).chain(removal.tables.iter().map(table)).collect()
}

fn table(message: NfTablesMessage) -> Option<String> {
    let NfTablesMessage::NewTable(table) = message else { return None };
    table.attributes.into_iter().find_map(|attribute| match attribute {
        TableAttribute::Name(name) => Some(name),
        _ => None,
    })
}

fn chain(message: NfTablesMessage) -> Option<Chain> {
    let NfTablesMessage::NewChain(chain) = message else { return None };
    let (mut table, mut name, mut is_base, mut policy, mut uses) = (None, None, false, Policy::Accept, None);
    for attribute in chain.attributes {
        match attribute {
            ChainAttribute::Table(text) => table = Some(text),
            ChainAttribute::Name(text) => name = Some(text),
            ChainAttribute::Hook(_) => is_base = true,
            ChainAttribute::Policy(verdict) if verdict != ACCEPT => policy = Policy::Drop,
            ChainAttribute::Use(count) => uses = usize::try_from(count).ok(),
            _ => {}
        }
    }
    Some(Chain { name: (table?, name?), built_in: is_base.then_some(policy), uses })
}

fn rule(message: NfTablesMessage) -> Option<Rule> {
    let NfTablesMessage::NewRule(rule) = message else { return None };
    let (mut table, mut chain, mut number, mut verdict) = (None, None, None, Verdict::Other);
    for attribute in rule.attributes {
        match attribute {
            RuleAttribute::Table(text) => table = Some(text),
            RuleAttribute::Chain(text) => chain = Some(text),
            RuleAttribute::Handle(handle) => number = Some(handle),
            RuleAttribute::Expressions(expressions) => {
                verdict = expressions.iter().find_map(decides).unwrap_or(Verdict::Other);
            }
            _ => {}
        }
    }
    Some(Rule { chain: (table?, chain?), handle: number?, verdict })
}

/// The verdict of an expression, if it ends the rule.
fn decides(expression: &ListAttribute<ExpressionAttribute>) -> Option<Verdict> {
    let ListAttribute::Element(parts) = expression else { return None };
    parts.iter().find_map(|part| match part {
        ExpressionAttribute::Data(Expressions::Immediate(attributes)) => {
            attributes.iter().find_map(|attribute| match attribute {
                Immediate::Data(DataAttribute::Verdict(verdict)) => Some(given(verdict)),
                _ => None,
            })
        }
        ExpressionAttribute::Data(Expressions::Other { expression_type, attributes }) => {
            match expression_type.as_str() {
                "reject" | "queue" => Some(Verdict::Refuse),
                "target" => {
                    attributes.iter().find_map(|attribute| is_refusal(attribute).then_some(Verdict::Refuse))
                }
                _ => None,
            }
        }
        _ => None,
    })
}

fn given(verdict: &[VerdictAttribute]) -> Verdict {
    let chain = verdict.iter().find_map(|attribute| match attribute {
        VerdictAttribute::Chain(name) => Some(Verdict::Chain(name.clone())),
        _ => None,
    });
    let refuses = verdict.iter().any(|attribute| match attribute {
        VerdictAttribute::Code(Code::Other(code)) => *code != ACCEPT,
        _ => false,
    });
    chain.unwrap_or(if refuses { Verdict::Refuse } else { Verdict::Other })
}

/// Whether this attribute is the name of an iptables target that drops or rejects.
fn is_refusal(attribute: &DefaultNla) -> bool {
    let mut name = vec![0; attribute.value_len()];
    attribute.emit_value(&mut name);
    attribute.kind() == TARGET_NAME
        && chains::is_refusal(name.split(|byte| *byte == 0).next().unwrap_or_default())
}
