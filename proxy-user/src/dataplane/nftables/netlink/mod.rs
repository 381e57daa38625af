//! nf_tables objects as libnftnl builds and reads them.
//!
//! In: tables, sets, chains, rules and elements as plain Rust values. Out: one netlink batch in a buffer; `read` parses
//! dumps. `nftnl` gives the batch, table, chain
//! and rule; maps, set elements and the expressions it has no type for are built here through `nftnl-sys`.

#![expect(unsafe_code, reason = "a C library and system calls; every block states why it is sound")]

use std::{
    ffi::{CStr, CString, c_void},
    ptr::NonNull,
};

use nftnl::{
    Batch, Chain, ChainType, Hook, MsgType, NlMsg, Policy, ProtoFamily, Rule, Table,
    expr::Expression,
    nftnl_sys::{self as sys, libc},
};
use smallvec::SmallVec;

mod read;

pub(super) use read::{
    Dump, NEW_GENERATION, ReadChain, dump_request, generation_request, get_request, parse_chain,
    parse_counter, parse_elements, parse_generation, parse_set,
};

/// Key or value bytes; an IPv6 key with a source range is the longest.
pub(super) type Bytes = SmallVec<[u8; 40]>;

/// A value of one attribute of an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Attribute {
    U32(u32),
    U64(u64),
    U8(u8),
    Bytes(Bytes),
    Name(CString),
    /// An expression that each element of a set has for itself.
    Expr(Box<Expr>),
}

/// One expression of a rule: libnftnl's name for its kind, and its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Expr {
    pub(super) kind: &'static CStr,
    pub(super) attributes: Vec<(u32, Attribute)>,
}

/// Stops the program: the C library gives a null pointer only when the machine is out of memory.
fn allocated<T>(pointer: *mut T) -> NonNull<T> {
    NonNull::new(pointer).unwrap_or_else(|| std::process::abort())
}

impl Expression for Expr {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        self.made()
    }
}

impl Expr {
    /// The expression as libnftnl has it, for what it is added to.
    fn made(&self) -> NonNull<sys::nftnl_expr> {
        // SAFETY: `kind` is a NUL-terminated string that outlives the call.
        let expr = allocated(unsafe { sys::nftnl_expr_alloc(self.kind.as_ptr()) });
        let raw = expr.as_ptr();
        for (attribute, value) in &self.attributes {
            let attribute = *attribute as u16;
            // SAFETY: `raw` was just allocated; libnftnl copies what it is given before it returns, but for an expression,
            // which is made here and which it owns and frees from then on.
            unsafe {
                match value {
                    Attribute::U8(value) => sys::nftnl_expr_set_u8(raw, attribute, *value),
                    Attribute::U32(value) => sys::nftnl_expr_set_u32(raw, attribute, *value),
                    Attribute::U64(value) => sys::nftnl_expr_set_u64(raw, attribute, *value),
                    Attribute::Bytes(value) => {
                        sys::nftnl_expr_set(raw, attribute, value.as_ptr().cast(), value.len() as u32);
                    }
                    Attribute::Name(value) => {
                        sys::nftnl_expr_set_str(raw, attribute, value.as_ptr());
                    }
                    Attribute::Expr(value) => {
                        sys::nftnl_expr_set(raw, attribute, value.made().as_ptr().cast(), 0);
                    }
                }
            }
        }
        expr
    }
}

/// What a map's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueKind {
    /// A plain set: no values.
    None,
    /// nft's number for the type, and the length in bytes.
    Data { nft_type: u32, len: u32 },
    /// Verdicts.
    Verdict,
}

impl SetSpec {
    /// Whether rules and elements that are made for the one can be used with the other.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let shape = |spec: &Self| (spec.key_type, spec.key_len, spec.value, spec.flags, spec.size);
        shape(self) == shape(other) && (other.parts.is_empty() || self.parts == other.parts)
    }
}

/// A set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SetSpec {
    pub(super) name: String,
    /// nft's number for the key's type, so that `nft list` prints it.
    pub(super) key_type: u32,
    pub(super) key_len: u32,
    pub(super) value: ValueKind,
    /// `NFT_SET_*`.
    pub(super) flags: u32,
    /// Most elements it may hold; 0 for no bound.
    pub(super) size: u32,
    /// Lengths of the key's parts, for sets with ranges; empty otherwise.
    pub(super) parts: Vec<u8>,
    /// What `nft` keeps about a set for itself.
    pub(super) userdata: Vec<u8>,
}

/// Type, hook and priority of a base chain that is there.
pub(super) type Hooked = (String, u32, i32);

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChainSpec {
    pub(super) name: String,
    /// Type, hook and priority of a base chain.
    pub(super) hook: Option<(ChainType, Hook, i32)>,
    /// What `nft` keeps about a chain for itself.
    pub(super) userdata: Vec<u8>,
}

impl ChainSpec {
    pub(super) fn regular(name: &str) -> Self {
        Self { name: name.to_owned(), hook: None, userdata: Vec::new() }
    }

    /// How it is hooked, as it is read back.
    pub(super) fn hooked(&self) -> Option<Hooked> {
        let (kind, hook, priority) = self.hook?;
        let kind = match kind {
            ChainType::Filter => "filter",
            ChainType::Route => "route",
            ChainType::Nat => "nat",
        };
        Some((kind.to_owned(), hook as u32, priority))
    }
}

/// The value of a map's element.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Value {
    None,
    Data(Bytes),
    /// `goto` this chain.
    Goto(String),
    /// `accept` (true) or `drop` (false).
    Accept(bool),
}

/// One element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Element {
    pub(super) key: Bytes,
    /// The end of the key's range, in sets with ranges.
    pub(super) key_end: Option<Bytes>,
    pub(super) value: Value,
}

/// What one message of a transaction is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum About {
    Table,
    /// A set, a chain, rules of a chain, or an element that leads to a chain.
    Object(String),
    /// An element of a set.
    Element(String, Bytes),
}

/// A batch of changes to one table, applied by the kernel as a whole or not at all.
pub(super) struct Transaction<'a> {
    batch: Batch,
    table: &'a Table,
    sets: u32,
    /// What each message is about, where that is asked for.
    about: Option<Vec<About>>,
}

/// Most bytes of elements in one message: an attribute can have 64 KiB, the list of elements is one.
const BYTES_A_MESSAGE: usize = 60_000;

impl Element {
    /// No less than what the element takes in a message: six attribute headers and three paddings at the most.
    fn bytes(&self) -> usize {
        let value = match &self.value {
            Value::None => 0,
            Value::Data(bytes) => bytes.len(),
            Value::Accept(_) => 8,
            Value::Goto(chain) => 8 + chain.len() + 1,
        };
        6 * 4 + 3 * 3 + self.key.len() + self.key_end.as_ref().map_or(0, |end| end.len()) + value
    }
}

/// The first elements that fit in one message, at least one, and the rest.
fn split_message(elements: &[Element]) -> (&[Element], &[Element]) {
    let mut bytes = 0;
    let fits = elements.iter().position(|element| {
        bytes += element.bytes();
        bytes > BYTES_A_MESSAGE
    });
    elements.split_at(fits.unwrap_or(elements.len()).max(1).min(elements.len()))
}

impl<'a> Transaction<'a> {
    pub(super) fn new(table: &'a Table) -> Self {
        Self { batch: Batch::new(), table, sets: 0, about: None }
    }

    /// One that is only tried out, with a message for each element: the kernel reports each message that it refuses.
    pub(super) fn on_trial(table: &'a Table) -> Self {
        Self { about: Some(Vec::new()), ..Self::new(table) }
    }

    fn push(&mut self, message: &impl NlMsg, kind: MsgType, about: impl FnOnce() -> About) {
        self.batch.add(message, kind);
        if let Some(all) = &mut self.about {
            all.push(about());
        }
    }

    pub(super) fn add_table(&mut self) {
        self.push(self.table, MsgType::Add, || About::Table);
    }

    pub(super) fn delete_table(&mut self) {
        self.push(self.table, MsgType::Del, || About::Table);
    }

    pub(super) fn add_set(&mut self, spec: &SetSpec) {
        self.sets += 1;
        let message = SetMessage { table: self.table, spec, id: self.sets };
        self.push(&message, MsgType::Add, || About::Object(spec.name.clone()));
    }

    pub(super) fn delete_set(&mut self, name: &str) {
        let message = Plain { table: self.table, what: Named::Set, name: c_string(name) };
        self.push(&message, MsgType::Del, || About::Object(name.to_owned()));
    }

    /// Adds a named counter, at zero. There must be none of this name.
    pub(super) fn add_counter(&mut self, name: &str) {
        let message = CounterMessage { table: self.table, name: c_string(name) };
        self.push(&message, MsgType::Add, || About::Object(name.to_owned()));
    }

    pub(super) fn add_chain(&mut self, spec: &ChainSpec) {
        let about = || About::Object(spec.name.clone());
        if !spec.userdata.is_empty() {
            return self.push(&NotedChain { table: self.table, spec }, MsgType::Add, about);
        }
        let mut chain = Chain::new(c_string(&spec.name), self.table);
        if let Some((kind, hook, priority)) = spec.hook {
            chain.set_type(kind);
            chain.set_hook(hook, priority);
            chain.set_policy(Policy::Accept);
        }
        self.push(&chain, MsgType::Add, about);
    }

    pub(super) fn delete_chain(&mut self, name: &str) {
        let chain = Chain::new(c_string(name), self.table);
        self.push(&chain, MsgType::Del, || About::Object(name.to_owned()));
    }

    /// Removes every rule of a chain.
    pub(super) fn flush_chain(&mut self, name: &str) {
        let message = Plain { table: self.table, what: Named::RulesOf, name: c_string(name) };
        self.push(&message, MsgType::Del, || About::Object(name.to_owned()));
    }

    /// Puts these rules in place of those that a chain has.
    pub(super) fn replace_rules(&mut self, name: &str, rules: &[Vec<Expr>]) {
        self.flush_chain(name);
        rules.iter().for_each(|rule| self.add_rule(name, rule));
    }

    /// Appends a rule to a chain.
    pub(super) fn add_rule(&mut self, name: &str, expressions: &[Expr]) {
        let chain = Chain::new(c_string(name), self.table);
        let mut rule = Rule::new(&chain);
        for expression in expressions {
            rule.add_expr(expression);
        }
        self.push(&rule, MsgType::Add, || About::Object(name.to_owned()));
    }

    /// Adds elements. One whose key is there fails the batch, with `EEXIST` or `EBUSY`.
    pub(super) fn add_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(set, elements, MsgType::Add, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
    }

    /// Adds elements, but leaves one as it is that is there with the same value. Only another value fails the batch.
    pub(super) fn add_missing_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(set, elements, MsgType::Add, libc::NLM_F_CREATE);
    }

    /// Removes elements by key; their values do not matter.
    pub(super) fn delete_elements(&mut self, set: &str, elements: &[Element]) {
        self.elements(set, elements, MsgType::Del, 0);
    }

    /// Removes every element of a set.
    pub(super) fn flush_set(&mut self, set: &str) {
        let (table, name, kind) = (self.table, c_string(set), MsgType::Del);
        let message = ElementsMessage { table, set: &name, elements: &[], kind, flags: 0 };
        self.push(&message, kind, || About::Object(set.to_owned()));
    }

    fn elements(&mut self, set: &str, elements: &[Element], kind: MsgType, flags: i32) {
        let name = c_string(set);
        let mut rest = elements;
        while !rest.is_empty() {
            let (elements, behind) =
                if self.about.is_some() { rest.split_at(1) } else { split_message(rest) };
            let message = ElementsMessage { table: self.table, set: &name, elements, kind, flags };
            self.push(&message, kind, || match elements {
                [Element { value: Value::Goto(chain), .. }] => About::Object(chain.clone()),
                [Element { key, .. }, ..] => About::Element(set.to_owned(), key.clone()),
                [] => About::Object(set.to_owned()),
            });
            rest = behind;
        }
    }

    /// The finished batch as one buffer: its parts must reach the kernel in one system call.
    pub(super) fn finish(self) -> Vec<u8> {
        self.finish_trial().0
    }

    /// A batch that the kernel works through and takes back, and what each message between its first and its last one is
    /// about.
    pub(super) fn finish_trial(self) -> (Vec<u8>, Vec<About>) {
        let mut buffer = Vec::new();
        for page in &self.batch.finalize() {
            buffer.extend_from_slice(page);
        }
        match self.about {
            // Without its last message a batch does not come into force.
            Some(about) => {
                const LAST: usize = 16 + 4;
                buffer.truncate(buffer.len().saturating_sub(LAST));
                (buffer, about)
            }
            None => (buffer, Vec::new()),
        }
    }
}

/// Names come from fixed tables and from Kubernetes names, which have no NUL; one that has is cut there and then
/// refused by the kernel as unknown.
pub(super) fn c_string(name: &str) -> CString {
    CString::new(name.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

/// Writes the message header; the payload goes behind it.
///
/// # Safety
///
/// `buffer` must have room for the largest netlink message, as the contract of [`NlMsg::write`] says.
unsafe fn header(
    buffer: *mut c_void,
    message: i32,
    family: ProtoFamily,
    flags: i32,
    seq: u32,
) -> *mut libc::nlmsghdr {
    // SAFETY: forwarded to the caller.
    unsafe { sys::nftnl_nlmsg_build_hdr(buffer.cast(), message as u16, family as u16, flags as u16, seq) }
}

/// An owned `nftnl_set`.
struct RawSet(NonNull<sys::nftnl_set>);

impl RawSet {
    fn new(table: &Table, name: &CStr) -> Self {
        // SAFETY: no arguments; the result is checked.
        let set = allocated(unsafe { sys::nftnl_set_alloc() });
        // SAFETY: `set` is valid, and both strings are copied before the calls return.
        unsafe {
            sys::nftnl_set_set_u32(set.as_ptr(), sys::NFTNL_SET_FAMILY as u16, table.get_family() as u32);
            sys::nftnl_set_set_str(set.as_ptr(), sys::NFTNL_SET_TABLE as u16, table.get_name().as_ptr());
            if !name.is_empty() {
                sys::nftnl_set_set_str(set.as_ptr(), sys::NFTNL_SET_NAME as u16, name.as_ptr());
            }
        }
        Self(set)
    }

    fn set_u32(&mut self, attribute: u32, value: u32) {
        // SAFETY: the set is valid for as long as `self` lives.
        unsafe { sys::nftnl_set_set_u32(self.0.as_ptr(), attribute as u16, value) }
    }

    fn set_data(&mut self, attribute: u32, data: &[u8]) {
        // SAFETY: as above; libnftnl copies `data`.
        unsafe {
            sys::nftnl_set_set_data(
                self.0.as_ptr(),
                attribute as u16,
                data.as_ptr().cast(),
                data.len() as u32,
            );
        }
    }

    fn get_u32(&self, attribute: u32) -> u32 {
        // SAFETY: as above; an attribute that is not set reads as 0.
        unsafe { sys::nftnl_set_get_u32(self.0.as_ptr(), attribute as u16) }
    }

    /// What this version would write to make such a set.
    fn spec(&self) -> SetSpec {
        let value = match (self.get_u32(sys::NFTNL_SET_FLAGS) & MAP, self.get_u32(sys::NFTNL_SET_DATA_TYPE)) {
            (0, _) => ValueKind::None,
            (_, VERDICT_TYPE) => ValueKind::Verdict,
            (_, nft_type) => ValueKind::Data { nft_type, len: self.get_u32(sys::NFTNL_SET_DATA_LEN) },
        };
        SetSpec {
            name: self.name(),
            key_type: self.get_u32(sys::NFTNL_SET_KEY_TYPE),
            key_len: self.get_u32(sys::NFTNL_SET_KEY_LEN),
            value,
            flags: self.get_u32(sys::NFTNL_SET_FLAGS) & !MAP,
            size: self.get_u32(sys::NFTNL_SET_DESC_SIZE),
            parts: self.get_data(sys::NFTNL_SET_DESC_CONCAT),
            userdata: Vec::new(),
        }
    }

    fn get_data(&self, attribute: u32) -> Vec<u8> {
        let mut len = 0;
        // SAFETY: the set is valid; what is pointed to lives as long as it, is `len` bytes long, and is copied.
        unsafe {
            let data = sys::nftnl_set_get_data(self.0.as_ptr(), attribute as u16, &raw mut len).cast::<u8>();
            if data.is_null() { Vec::new() } else { std::slice::from_raw_parts(data, len as usize).to_vec() }
        }
    }

    fn name(&self) -> String {
        // SAFETY: the pointer is null or a NUL-terminated string owned by the set.
        unsafe { owned_string(sys::nftnl_set_get_str(self.0.as_ptr(), sys::NFTNL_SET_NAME as u16)) }
    }
}

impl Drop for RawSet {
    fn drop(&mut self) {
        // SAFETY: the set is ours and is not used again; it frees its elements too.
        unsafe { sys::nftnl_set_free(self.0.as_ptr()) }
    }
}

/// # Safety
///
/// `text` must be null or a NUL-terminated string.
unsafe fn owned_string(text: *const libc::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: forwarded to the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

struct SetMessage<'a> {
    table: &'a Table,
    spec: &'a SetSpec,
    id: u32,
}

const VERDICT_TYPE: u32 = 0xffff_ff00;
const MAP: u32 = libc::NFT_SET_MAP as u32;

// SAFETY: a set message has a name, a few numbers and some bytes of user data: far below the largest message.
unsafe impl NlMsg for SetMessage<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        let SetSpec { name, key_type, key_len, value, flags, size, parts, userdata } = self.spec;
        let mut set = RawSet::new(self.table, &c_string(name));
        set.set_u32(sys::NFTNL_SET_ID, self.id);
        set.set_u32(sys::NFTNL_SET_KEY_TYPE, *key_type);
        set.set_u32(sys::NFTNL_SET_KEY_LEN, *key_len);
        let map = if *value == ValueKind::None { 0 } else { MAP };
        set.set_u32(sys::NFTNL_SET_FLAGS, *flags | map);
        match *value {
            ValueKind::None => {}
            ValueKind::Data { nft_type, len } => {
                set.set_u32(sys::NFTNL_SET_DATA_TYPE, nft_type);
                set.set_u32(sys::NFTNL_SET_DATA_LEN, len);
            }
            ValueKind::Verdict => {
                set.set_u32(sys::NFTNL_SET_DATA_TYPE, VERDICT_TYPE);
                set.set_u32(sys::NFTNL_SET_DATA_LEN, 0);
            }
        }
        if *size > 0 {
            set.set_u32(sys::NFTNL_SET_DESC_SIZE, *size);
        }
        if !parts.is_empty() {
            set.set_data(sys::NFTNL_SET_DESC_CONCAT, parts);
        }
        if !userdata.is_empty() {
            set.set_data(sys::NFTNL_SET_USERDATA, userdata);
        }
        // SAFETY: `buffer` is as large as the trait promises; the set is valid.
        unsafe {
            let header =
                header(buffer, libc::NFT_MSG_NEWSET, self.table.get_family(), libc::NLM_F_CREATE, seq);
            sys::nftnl_set_nlmsg_build_payload(header, set.0.as_ptr());
        }
    }
}

/// `NFT_OBJECT_COUNTER` of the kernel's interface.
pub(super) const OBJECT_COUNTER: u32 = 1;

/// An owned `nftnl_obj` that is a counter.
struct RawCounter(NonNull<sys::nftnl_obj>);

impl RawCounter {
    fn new(table: &Table) -> Self {
        // SAFETY: no arguments; the result is checked.
        let counter = allocated(unsafe { sys::nftnl_obj_alloc() });
        let raw = counter.as_ptr();
        // SAFETY: `raw` is valid, and the name is copied before the call returns.
        unsafe {
            sys::nftnl_obj_set_u32(raw, sys::NFTNL_OBJ_FAMILY as u16, table.get_family() as u32);
            sys::nftnl_obj_set_str(raw, sys::NFTNL_OBJ_TABLE as u16, table.get_name().as_ptr());
            sys::nftnl_obj_set_u32(raw, sys::NFTNL_OBJ_TYPE as u16, OBJECT_COUNTER);
        }
        Self(counter)
    }
}

impl Drop for RawCounter {
    fn drop(&mut self) {
        // SAFETY: the object is ours and is not used again.
        unsafe { sys::nftnl_obj_free(self.0.as_ptr()) }
    }
}

struct CounterMessage<'a> {
    table: &'a Table,
    name: CString,
}

// SAFETY: a header, two names and a few numbers.
unsafe impl NlMsg for CounterMessage<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        let counter = RawCounter::new(self.table);
        let raw = counter.0.as_ptr();
        // SAFETY: `buffer` is as large as the trait promises; the counter is valid, and the name is copied.
        unsafe {
            sys::nftnl_obj_set_str(raw, sys::NFTNL_OBJ_NAME as u16, self.name.as_ptr());
            let header =
                header(buffer, libc::NFT_MSG_NEWOBJ, self.table.get_family(), libc::NLM_F_CREATE, seq);
            sys::nftnl_obj_nlmsg_build_payload(header, raw);
        }
    }
}

enum Named {
    Set,
    RulesOf,
}

/// A message that names an object and nothing else.
struct Plain<'a> {
    table: &'a Table,
    what: Named,
    name: CString,
}

// SAFETY: a header and two names.
unsafe impl NlMsg for Plain<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        match self.what {
            Named::Set => {
                let set = RawSet::new(self.table, &self.name);
                // SAFETY: `buffer` is as large as the trait promises; the set is valid.
                unsafe {
                    let header = header(buffer, libc::NFT_MSG_DELSET, self.table.get_family(), 0, seq);
                    sys::nftnl_set_nlmsg_build_payload(header, set.0.as_ptr());
                }
            }
            Named::RulesOf => {
                // SAFETY: as above; the rule is allocated, filled with copies of the names, and freed here.
                unsafe {
                    let header = header(buffer, libc::NFT_MSG_DELRULE, self.table.get_family(), 0, seq);
                    let rule = allocated(sys::nftnl_rule_alloc());
                    sys::nftnl_rule_set_str(
                        rule.as_ptr(),
                        sys::NFTNL_RULE_TABLE as u16,
                        self.table.get_name().as_ptr(),
                    );
                    sys::nftnl_rule_set_str(rule.as_ptr(), sys::NFTNL_RULE_CHAIN as u16, self.name.as_ptr());
                    sys::nftnl_rule_nlmsg_build_payload(header, rule.as_ptr());
                    sys::nftnl_rule_free(rule.as_ptr());
                }
            }
        }
    }
}

/// A regular chain with user data, which the crate's chains cannot have.
struct NotedChain<'a> {
    table: &'a Table,
    spec: &'a ChainSpec,
}

// SAFETY: a header, two names and at most 256 bytes of user data.
unsafe impl NlMsg for NotedChain<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        let ChainSpec { name, userdata, .. } = self.spec;
        let (family, name) = (self.table.get_family(), c_string(name));
        // SAFETY: `buffer` is as large as the trait promises; the chain is allocated, filled with copies, and freed here.
        unsafe {
            let chain = allocated(sys::nftnl_chain_alloc()).as_ptr();
            sys::nftnl_chain_set_str(chain, sys::NFTNL_CHAIN_TABLE as u16, self.table.get_name().as_ptr());
            sys::nftnl_chain_set_str(chain, sys::NFTNL_CHAIN_NAME as u16, name.as_ptr());
            sys::nftnl_chain_set_data(
                chain,
                sys::NFTNL_CHAIN_USERDATA as u16,
                userdata.as_ptr().cast(),
                userdata.len() as u32,
            );
            let header = header(buffer, libc::NFT_MSG_NEWCHAIN, family, libc::NLM_F_CREATE, seq);
            sys::nftnl_chain_nlmsg_build_payload(header, chain);
            sys::nftnl_chain_free(chain);
        }
    }
}

struct ElementsMessage<'a> {
    table: &'a Table,
    set: &'a CStr,
    elements: &'a [Element],
    kind: MsgType,
    /// `NLM_F_*`.
    flags: i32,
}

impl ElementsMessage<'_> {
    fn raw(&self) -> RawSet {
        let set = RawSet::new(self.table, self.set);
        for element in self.elements {
            // SAFETY: no arguments; the result is checked.
            let raw = allocated(unsafe { sys::nftnl_set_elem_alloc() }).as_ptr();
            let data = |attribute: u32, bytes: &[u8]| {
                // SAFETY: `raw` is valid, and the bytes are copied; libnftnl refuses more than 64 of them.
                unsafe {
                    sys::nftnl_set_elem_set(raw, attribute as u16, bytes.as_ptr().cast(), bytes.len() as u32);
                }
            };
            let verdict = |code: i32| {
                // SAFETY: `raw` is valid.
                unsafe { sys::nftnl_set_elem_set_u32(raw, sys::NFTNL_SET_ELEM_VERDICT as u16, code as u32) }
            };
            data(sys::NFTNL_SET_ELEM_KEY, &element.key);
            if let Some(end) = &element.key_end {
                data(sys::NFTNL_SET_ELEM_KEY_END, end);
            }
            if self.kind == MsgType::Add {
                match &element.value {
                    Value::None => {}
                    Value::Data(bytes) => data(sys::NFTNL_SET_ELEM_DATA, bytes),
                    Value::Accept(accept) => {
                        verdict(if *accept { libc::NF_ACCEPT } else { libc::NF_DROP });
                    }
                    Value::Goto(chain) => {
                        verdict(libc::NFT_GOTO);
                        let chain = c_string(chain);
                        // SAFETY: `raw` is valid; the name is copied.
                        unsafe {
                            sys::nftnl_set_elem_set_str(
                                raw,
                                sys::NFTNL_SET_ELEM_CHAIN as u16,
                                chain.as_ptr(),
                            );
                        }
                    }
                }
            }
            // SAFETY: both are valid; the set owns the element from here.
            unsafe { sys::nftnl_set_elem_add(set.0.as_ptr(), raw) }
        }
        set
    }
}

// SAFETY: BYTES_A_MESSAGE and two names are less than the largest message.
unsafe impl NlMsg for ElementsMessage<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        let message = match kind {
            MsgType::Add => libc::NFT_MSG_NEWSETELEM,
            MsgType::Del => libc::NFT_MSG_DELSETELEM,
        };
        let set = self.raw();
        // SAFETY: `buffer` is as large as the trait promises; the set is valid.
        unsafe {
            let header = header(buffer, message, self.table.get_family(), self.flags, seq);
            sys::nftnl_set_elems_nlmsg_build_payload(header, set.0.as_ptr());
        }
    }
}
