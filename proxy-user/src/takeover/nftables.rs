//! Reading the whole rule set of a family, and deleting some of it at one instant.
//!
//! In: nf_tables' messages. Out: [`Found`]; and one batch that deletes [`Theirs`].

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
    chains::{self, Chain, Found, Name, Policy, Rule, Theirs, Verdict},
};

/// The families kube-proxy writes to, as `nft` calls them.
pub(super) const FAMILIES: [(NetfilterProtoFamily, &str); 2] =
    [(NetfilterProtoFamily::IPv4, "ip"), (NetfilterProtoFamily::IPv6, "ip6")];

/// The number of nf_tables among netfilter's subsystems, for which a batch is.
const NF_TABLES: u16 = 10;
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;
/// `NFTA_TARGET_NAME`, of a target of iptables.
const TARGET_NAME: u16 = 1;
/// A rule set that changes more often than this while it is read, or before its part is removed, is left alone.
const ATTEMPTS: usize = 20;

/// Removes kube-proxy's part of a family's rules, and tells what that was and what stays of it.
///
/// # Errors
///
/// The kernel's, and that other programs keep changing the rules.
pub(super) fn remove(family: NetfilterProtoFamily, name: &'static str) -> Result<Theirs, Error> {
    let error = |what| move |source| Error::RuleSet { what, family: name, source };
    let mut rules = RuleSet::open().map_err(Error::Socket)?;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let theirs = chains::of_kube_proxy(&rules.read(family).map_err(error("read the rules"))?);
        match rules.remove(family, &theirs) {
            Ok(()) => return Ok(theirs),
            // Since the rules were read, a rule to one of the chains was added, or something that should go has gone.
            Err(changed) if attempts < ATTEMPTS && is_change(&changed) => {}
            Err(source) => return Err(error("remove the rules")(source)),
        }
    }
}

fn is_change(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT))
}

/// The rules, on a netlink socket.
struct RuleSet(Channel);

impl RuleSet {
    fn open() -> io::Result<Self> {
        Channel::open(NETLINK_NETFILTER).map(Self)
    }

    /// Everything of a family.
    fn read(&mut self, family: NetfilterProtoFamily) -> io::Result<Found> {
        let tables = NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() });
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let rules = NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() });
        Ok(Found {
            tables: self.dump(family, &tables, table)?,
            chains: self.dump(family, &chains, chain)?,
            rules: self.dump(family, &rules, rule)?,
        })
    }

    /// What `read` makes of each message. Nothing else is kept, because a node can have 100,000 rules.
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

    /// The answer to a dump; none when the rules changed meanwhile.
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

    /// Deletes all of it, or nothing.
    fn remove(&mut self, family: NetfilterProtoFamily, theirs: &Theirs) -> io::Result<()> {
        let deletions = deletions(theirs);
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
        self.complaints()
    }

    /// The first error reported. The kernel works on a batch while the sender waits, so all it has to say is there. All
    /// of it is taken, because the next request is answered on the same socket.
    fn complaints(&mut self) -> io::Result<()> {
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

/// What leads to a chain goes first, then what is in it, then it itself.
fn deletions(theirs: &Theirs) -> Vec<NfTablesMessage> {
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
    let single = theirs.rules.iter().map(|(chain, handle)| rule(chain, Some(*handle)));
    let rules = theirs.chains.iter().map(|chain| rule(chain, None));
    let chains = theirs.chains.iter().map(chain);
    single.chain(rules).chain(chains).chain(theirs.tables.iter().map(table)).collect()
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

/// Where an expression sends the packet, if it is one that ends the rule.
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

/// Whether this is the name of a target of iptables that ends a packet's way.
fn is_refusal(attribute: &DefaultNla) -> bool {
    let mut name = vec![0; attribute.value_len()];
    attribute.emit_value(&mut name);
    attribute.kind() == TARGET_NAME
        && chains::is_refusal(name.split(|byte| *byte == 0).next().unwrap_or_default())
}
