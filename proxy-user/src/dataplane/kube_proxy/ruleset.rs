//! Reading the whole rule set of a family, and deleting some of it at one instant.
//!
//! In: nf_tables' messages. Out: [`Found`]; and one batch that deletes [`Theirs`].

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkPayload};
use netlink_packet_netfilter::{
    NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    nftables::{
        ChainAttribute, ChainMessage, DataAttribute, ExpressionAttribute, Expressions, Immediate,
        ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
        VerdictAttribute,
    },
    none::ControlMessage,
};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::dataplane::channel::{Channel, messages, netfilter, serialize};

use super::chains::{Found, Jump, Theirs};

/// The families kube-proxy writes to, as `nft` calls them.
pub(super) const FAMILIES: [(NetfilterProtoFamily, &str); 2] =
    [(NetfilterProtoFamily::IPv4, "ip"), (NetfilterProtoFamily::IPv6, "ip6")];

/// The number of nf_tables among netfilter's subsystems, for which a batch is.
const NF_TABLES: u16 = 10;
/// A rule set that changes more often than this while it is read is not read.
const ATTEMPTS: usize = 20;

/// The rules, on a netlink socket.
pub(super) struct RuleSet(Channel);

impl RuleSet {
    pub(super) fn open() -> io::Result<Self> {
        Channel::open(NETLINK_NETFILTER).map(Self)
    }

    /// Everything of a family.
    pub(super) fn read(&mut self, family: NetfilterProtoFamily) -> io::Result<Found> {
        let mut found = Found::default();
        let tables = NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() });
        let chains = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
        let rules = NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() });
        for message in self.dump(family, tables)? {
            if let NfTablesMessage::NewTable(table) = message {
                found.tables.extend(table.attributes.into_iter().find_map(|attribute| match attribute {
                    TableAttribute::Name(name) => Some(name),
                    _ => None,
                }));
            }
        }
        for message in self.dump(family, chains)? {
            if let NfTablesMessage::NewChain(chain) = message {
                found.chains.extend(named(&chain));
            }
        }
        for message in self.dump(family, rules)? {
            if let NfTablesMessage::NewRule(rule) = message {
                found.jumps.extend(jump(&rule));
            }
        }
        Ok(found)
    }

    fn dump(
        &mut self,
        family: NetfilterProtoFamily,
        request: NfTablesMessage,
    ) -> io::Result<Vec<NfTablesMessage>> {
        for _ in 0..ATTEMPTS {
            self.0.send(&serialize(&[netfilter(NLM_F_REQUEST | NLM_F_DUMP, family, 0, request.clone())]))?;
            if let Some(messages) = self.answer()? {
                return Ok(messages);
            }
        }
        Err(io::Error::from_raw_os_error(libc::EINTR))
    }

    /// The answer to a dump; none when the rules changed meanwhile.
    fn answer(&mut self) -> io::Result<Option<Vec<NfTablesMessage>>> {
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
                            all.push(message);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Deletes all of it, or nothing.
    pub(super) fn remove(&mut self, family: NetfilterProtoFamily, theirs: &Theirs) -> io::Result<()> {
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

    /// The first error reported. The kernel works on a batch while the sender waits, so all it has to say is there.
    fn complaints(&mut self) -> io::Result<()> {
        while let Some(datagram) = self.0.receive_ready()? {
            for message in messages::<NetfilterMessage>(datagram) {
                if let NetlinkPayload::Error(error) = message.payload
                    && error.raw_code() != 0
                {
                    return Err(io::Error::from_raw_os_error(-error.raw_code()));
                }
            }
        }
        Ok(())
    }
}

/// What leads to a chain goes first, then what is in it, then it itself.
fn deletions(theirs: &Theirs) -> Vec<NfTablesMessage> {
    let rule = |table: &str, chain: &str, handle: Option<u64>| {
        let mut attributes =
            vec![RuleAttribute::Table(table.to_owned()), RuleAttribute::Chain(chain.to_owned())];
        attributes.extend(handle.map(RuleAttribute::Handle));
        NfTablesMessage::DeleteRule(RuleMessage { attributes })
    };
    let chain = |table: &str, chain: &str| {
        let attributes =
            vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain.to_owned())];
        NfTablesMessage::DeleteChain(ChainMessage { attributes })
    };
    let table = |name: &String| {
        let attributes = vec![TableAttribute::Name(name.clone())];
        NfTablesMessage::DeleteTable(TableMessage { attributes })
    };
    let jumps = theirs.jumps.iter().map(|Jump { from, handle, .. }| rule(&from.0, &from.1, Some(*handle)));
    let rules = theirs.chains.iter().map(|(table, name)| rule(table, name, None));
    let chains = theirs.chains.iter().map(|(table, name)| chain(table, name));
    jumps.chain(rules).chain(chains).chain(theirs.tables.iter().map(table)).collect()
}

fn named(chain: &ChainMessage) -> Option<(String, String)> {
    let (mut table, mut name) = (None, None);
    for attribute in &chain.attributes {
        match attribute {
            ChainAttribute::Table(text) => table = Some(text.clone()),
            ChainAttribute::Name(text) => name = Some(text.clone()),
            _ => {}
        }
    }
    Some((table?, name?))
}

/// The jump that a rule is, if it is one.
fn jump(rule: &RuleMessage) -> Option<Jump> {
    let (mut table, mut chain, mut number, mut to) = (None, None, None, None);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Table(text) => table = Some(text.clone()),
            RuleAttribute::Chain(text) => chain = Some(text.clone()),
            RuleAttribute::Handle(handle) => number = Some(*handle),
            RuleAttribute::Expressions(expressions) => to = expressions.iter().find_map(target),
            _ => {}
        }
    }
    Some(Jump { from: (table?, chain?), handle: number?, to: to? })
}

/// The chain that an expression leads to.
fn target(expression: &ListAttribute<ExpressionAttribute>) -> Option<String> {
    let ListAttribute::Element(parts) = expression else { return None };
    let immediate = parts.iter().find_map(|part| match part {
        ExpressionAttribute::Data(Expressions::Immediate(attributes)) => Some(attributes),
        _ => None,
    })?;
    let verdict = immediate.iter().find_map(|attribute| match attribute {
        Immediate::Data(DataAttribute::Verdict(verdict)) => Some(verdict),
        _ => None,
    })?;
    verdict.iter().find_map(|attribute| match attribute {
        VerdictAttribute::Chain(name) => Some(name.clone()),
        _ => None,
    })
}
