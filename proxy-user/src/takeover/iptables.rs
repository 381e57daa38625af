//! Tables of iptables' legacy variant, which programs read and replace as a whole.
//!
//! In: a table's bytes, and the chains to remove. Out: the table without these chains and without jumps to them.
//! Counters of other rules stay.
//!
//! A table is a sequence of entries of different lengths: first the rules of the built-in chains, then for each other
//! chain an entry with its name, and its rules. A jump contains its target's offset from the table's start, so jumps
//! to moved entries have to be rewritten (`include/uapi/linux/netfilter/x_tables.h`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    ops::Range,
};

use crate::{
    model::Family,
    sys::xtables::{Counters, REPLACE_LEN, Xtables},
};

use super::chains::{self, Chain, FamilyRules, Policy, Removal, Rule, Verdict};

/// After this many changes of the table by other programs, weir gives up.
const ATTEMPTS: usize = 20;
/// The size of a table's name, with the zero at its end.
const NAME_LEN: usize = 32;
/// The size of `struct ipt_getinfo`.
const INFO_LEN: usize = 84;
/// The built-in chains, by the number of their hook.
const HOOKS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
/// `NF_DROP` in a rule.
const DROP: i32 = -1;
/// `NF_QUEUE` in a rule.
const QUEUE: i32 = -4;
/// The offset of the entries in `struct ipt_get_entries`.
const ENTRIES: usize = 40;
/// The size of `struct xt_entry_target` without the target's own data.
const TARGET_LEN: usize = 32;

/// The tables of a family that the kernel has loaded.
pub(super) fn tables(family: Family) -> Vec<String> {
    let path = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    // A kernel without legacy tables does not have the file.
    let names = fs::read_to_string(path).unwrap_or_default();
    names.lines().filter(|name| chains::IPTABLES.contains(name)).map(str::to_owned).collect()
}

/// Removes kube-proxy's chains from a table. Returns which were removed and which stay.
///
/// # Errors
///
/// The kernel's; `WouldBlock` if other programs keep changing the table.
pub(super) fn remove(family: Family, name: &str) -> io::Result<Removal> {
    let kernel = Xtables::open(family)?;
    for _ in 0..ATTEMPTS {
        match attempt(&kernel, family, name) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

fn attempt(kernel: &Xtables, family: Family, name: &str) -> io::Result<Removal> {
    let table = Table::read(kernel, family, name)?;
    let removal = chains::of_kube_proxy(&table.found(name).ok_or(io::ErrorKind::InvalidData)?);
    if !removal.is_empty() {
        let shrunk = table.without(&removal).ok_or(io::ErrorKind::InvalidData)?;
        let counted = table.replace(kernel, name, &shrunk)?;
        add(kernel, name, shrunk.kept.iter().filter_map(|&index| counted.get(index)))?;
    }
    Ok(removal)
}

/// A table as the kernel returns it.
struct Table {
    family: Family,
    /// One bit for each hook with a chain.
    valid_hooks: u32,
    /// The offset of each hook's chain.
    hooks: [u32; 5],
    /// The offset of each hook's policy.
    policies: [u32; 5],
    count: u32,
    entries: Vec<u8>,
}

/// The new content of a table.
#[derive(Debug, PartialEq, Eq)]
struct Shrunk {
    hooks: [u32; 5],
    policies: [u32; 5],
    entries: Vec<u8>,
    /// The indexes of the old entries that stay.
    kept: Vec<usize>,
}

/// One entry: a rule, the beginning or the end of a chain.
struct Entry<'a> {
    range: Range<usize>,
    target: Target<'a>,
}

enum Target<'a> {
    /// The start of the chain with this name.
    Chain(&'a str),
    /// A jump to the entry at offset `to`, which is stored at offset `place`.
    Jump { place: usize, to: usize },
    /// A verdict or an extension; `refuses` if it drops, rejects or queues.
    Other { refuses: bool },
}

/// A chain: a range of entries.
struct Part<'a> {
    name: &'a str,
    /// Start, rules and end of a chain; a built-in chain has no start entry.
    entries: Range<usize>,
    /// Only the rules.
    rules: Range<usize>,
    /// The offset of the first rule.
    start: usize,
    built_in: Option<Policy>,
}

impl Table {
    fn read(kernel: &Xtables, family: Family, name: &str) -> io::Result<Self> {
        let mut info = padded(name);
        info.resize(INFO_LEN, 0);
        kernel.info(&mut info)?;
        let number = |at| u32_at(&info, at).ok_or(io::ErrorKind::InvalidData);
        let five = |at| -> io::Result<[u32; 5]> {
            let mut all = [0; 5];
            for (index, one) in all.iter_mut().enumerate() {
                *one = number(at + 4 * index)?;
            }
            Ok(all)
        };
        let (valid_hooks, hooks, policies) = (number(32)?, five(36)?, five(56)?);
        let (count, size) = (number(76)?, number(80)?);
        let mut entries = padded(name);
        entries.extend(size.to_ne_bytes());
        entries.resize(ENTRIES + size as usize, 0);
        kernel.entries(&mut entries)?;
        Ok(Self { family, valid_hooks, hooks, policies, count, entries: entries.split_off(ENTRIES) })
    }

    /// The chains and rules of the table. A rule's handle is the index of its entry. `None` if the bytes are malformed.
    fn found(&self, table: &str) -> Option<FamilyRules> {
        let all = self.parse()?;
        let parts = self.parts(&all)?;
        let names: BTreeMap<usize, &str> = parts.iter().map(|part| (part.start, part.name)).collect();
        let mut found = FamilyRules::default();
        for part in &parts {
            let chain = (table.to_owned(), part.name.to_owned());
            for index in part.rules.clone() {
                let verdict = match &all.get(index)?.target {
                    Target::Jump { to, .. } => match names.get(to) {
                        Some(name) => Verdict::Chain((*name).to_owned()),
                        // A rule without a target jumps to the next entry.
                        None => Verdict::Other,
                    },
                    Target::Other { refuses: true } => Verdict::Refuse,
                    Target::Other { refuses: false } => Verdict::Other,
                    Target::Chain(_) => return None,
                };
                found.rules.push(Rule { chain: chain.clone(), handle: index as u64, verdict });
            }
            found.chains.push(Chain { name: chain, built_in: part.built_in, uses: None });
        }
        Some(found)
    }

    /// The chains, built-in ones first. The last entry of a chain is its policy or its return.
    fn parts<'a>(&self, all: &'a [Entry<'a>]) -> Option<Vec<Part<'a>>> {
        let numbers: BTreeMap<usize, usize> =
            all.iter().enumerate().map(|(number, entry)| (entry.range.start, number)).collect();
        let mut parts = Vec::new();
        for (hook, name) in HOOKS.iter().enumerate().filter(|(hook, _)| self.has(*hook)) {
            let start = self.hooks[hook] as usize;
            let (first, end) = (*numbers.get(&start)?, *numbers.get(&(self.policies[hook] as usize))?);
            let policy = match all[end].target {
                Target::Other { refuses: true } => Policy::Drop,
                _ => Policy::Accept,
            };
            let (entries, rules) = (first..end + 1, first..end);
            parts.push(Part { name, entries, rules, start, built_in: Some(policy) });
        }
        let named = |(number, entry): (usize, &'a Entry<'a>)| match entry.target {
            Target::Chain(name) => Some((number, name)),
            _ => None,
        };
        let mut begins = all.iter().enumerate().filter_map(named).peekable();
        while let Some((begin, name)) = begins.next() {
            // A last such entry ends the table.
            let Some((end, _)) = begins.peek() else { break };
            let rules = begin + 1..end.checked_sub(1)?;
            parts.push(Part {
                name,
                entries: begin..*end,
                rules,
                start: all[begin].range.end,
                built_in: None,
            });
        }
        Some(parts)
    }

    /// The table without the rules and chains of `removal`. `None` if the bytes are malformed.
    fn without(&self, removal: &Removal) -> Option<Shrunk> {
        let all = self.parse()?;
        let mut gone = vec![false; all.len()];
        for (_, handle) in &removal.rules {
            *gone.get_mut(usize::try_from(*handle).ok()?)? = true;
        }
        let chains: BTreeSet<&str> = removal.chains.iter().map(|(_, chain)| chain.as_str()).collect();
        for part in self.parts(&all)?.iter().filter(|part| chains.contains(part.name)) {
            gone.get_mut(part.entries.clone())?.fill(true);
        }
        let (mut moved, mut kept, mut entries) = (BTreeMap::new(), Vec::new(), Vec::new());
        for (index, entry) in all.iter().enumerate() {
            moved.insert(entry.range.start, u32::try_from(entries.len()).ok()?);
            if !gone[index] {
                kept.push(index);
                entries.extend_from_slice(&self.entries[entry.range.clone()]);
            }
        }
        for entry in kept.iter().map(|&index| &all[index]) {
            if let Target::Jump { place, to } = entry.target {
                let place = *moved.get(&entry.range.start)? as usize + (place - entry.range.start);
                entries.get_mut(place..place + 4)?.copy_from_slice(&moved.get(&to)?.to_ne_bytes());
            }
        }
        let follow = |places: [u32; 5]| {
            let mut followed = places;
            for (hook, place) in followed.iter_mut().enumerate().filter(|(hook, _)| self.has(*hook)) {
                *place = *moved.get(&(places[hook] as usize))?;
            }
            Some(followed)
        };
        let (hooks, policies) = (follow(self.hooks)?, follow(self.policies)?);
        Some(Shrunk { hooks, policies, entries, kept })
    }

    fn has(&self, hook: usize) -> bool {
        self.valid_hooks & 1 << hook != 0
    }

    /// The entries; `None` if the bytes are malformed.
    fn parse(&self) -> Option<Vec<Entry<'_>>> {
        // The place of `target_offset` and `next_offset` in `struct ipt_entry` and `struct ip6t_entry`.
        let offsets = match self.family {
            Family::V4 => 88,
            Family::V6 => 140,
        };
        let mut all = Vec::new();
        let mut start = 0;
        while start < self.entries.len() {
            let u16_at =
                |at: usize| Some(usize::from(u16::from_ne_bytes(*self.entries.get(at..)?.first_chunk()?)));
            let target = start + u16_at(start + offsets)?;
            let end = start + u16_at(start + offsets + 2)?;
            let data = target + TARGET_LEN;
            if data > end || end > self.entries.len() {
                return None;
            }
            let target = match text(self.entries.get(target + 2..data)?)? {
                "ERROR" => Target::Chain(text(self.entries.get(data..end)?)?),
                // A standard target: a jump, or a negative verdict in the same place.
                "" => {
                    let verdict = u32_at(&self.entries, data)?.cast_signed();
                    match verdict.try_into() {
                        Ok(to) => Target::Jump { place: data, to },
                        Err(_) => Target::Other { refuses: [DROP, QUEUE].contains(&verdict) },
                    }
                }
                name => Target::Other { refuses: chains::is_refusal(name.as_bytes()) },
            };
            all.push(Entry { range: start..end, target });
            start = end;
        }
        Some(all)
    }

    /// Replaces the table, unless another program has changed its number of entries. Returns the old entries' counters.
    fn replace(&self, kernel: &Xtables, name: &str, shrunk: &Shrunk) -> io::Result<Vec<Counters>> {
        let numbers = [self.valid_hooks, length(shrunk.kept.len())?, length(shrunk.entries.len())?];
        let numbers = numbers.into_iter().chain(shrunk.hooks).chain(shrunk.policies).chain([self.count]);
        let mut replace = padded(name);
        replace.extend(numbers.flat_map(u32::to_ne_bytes));
        replace.resize(REPLACE_LEN, 0);
        replace.extend_from_slice(&shrunk.entries);
        let mut counted: Vec<Counters> = vec![[0; 2]; self.count as usize];
        kernel.replace(&mut replace, &mut counted)?;
        Ok(counted)
    }
}

/// Adds counters to the entries of a table.
fn add<'a>(kernel: &Xtables, name: &str, counted: impl Iterator<Item = &'a Counters>) -> io::Result<()> {
    let numbers: Vec<u64> = counted.flatten().copied().collect();
    let mut counters = padded(name);
    counters.extend(length(numbers.len() / 2)?.to_ne_bytes());
    counters.extend([0; 4]);
    counters.extend(numbers.into_iter().flat_map(u64::to_ne_bytes));
    kernel.add_counters(&counters)
}

fn length(length: usize) -> io::Result<u32> {
    u32::try_from(length).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn padded(name: &str) -> Vec<u8> {
    let mut name = name.as_bytes().to_vec();
    name.resize(NAME_LEN, 0);
    name
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The text before the first zero.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
}
