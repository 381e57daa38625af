//! The messages that `nftnl` has no type for, built and freed through `nftnl-sys`.
//!
//! In: plain values. Out: bytes in the buffer of a batch.

use std::{
    ffi::{CStr, CString, c_void},
    ptr::NonNull,
};

use nftnl::{
    MsgType, NlMsg, ProtoFamily, Rule, Table,
    expr::Expression,
    nftnl_sys::{self as sys, libc},
};

use super::objects::{Attribute, ChainSpec, Element, Expr, SetSpec, Value, ValueKind, c_string};

/// Aborts on a null pointer, which the C library returns only when the machine is out of memory.
pub(super) fn allocated<T>(pointer: *mut T) -> NonNull<T> {
    NonNull::new(pointer).unwrap_or_else(|| std::process::abort())
}

impl Expression for Expr {
    fn to_expr(&self, _: &Rule<'_>) -> NonNull<sys::nftnl_expr> {
        self.allocate()
    }
}

impl Expr {
    /// Allocates libnftnl's form of the expression. The rule or expression that it is added to frees it.
    fn allocate(&self) -> NonNull<sys::nftnl_expr> {
        // SAFETY: `kind` is a NUL-terminated string that outlives the call.
        let expr = allocated(unsafe { sys::nftnl_expr_alloc(self.kind.as_ptr()) });
        let raw = expr.as_ptr();
        for (attribute, value) in &self.attributes {
            let attribute = *attribute as u16;
            // SAFETY: `raw` was just allocated. libnftnl copies each value before it returns, except an expression,
            // which is allocated here and which libnftnl owns and frees from then on.
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
                        sys::nftnl_expr_set(raw, attribute, value.allocate().as_ptr().cast(), 0);
                    }
                }
            }
        }
        expr
    }
}

/// Writes the header of a message; the caller writes the payload after it.
///
/// # Safety
///
/// `buffer` must have room for the largest netlink message, as the contract of [`NlMsg::write`] says.
pub(super) unsafe fn header(
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
pub(super) struct RawSet(pub(super) NonNull<sys::nftnl_set>);

impl RawSet {
    pub(super) fn new(table: &Table, name: &CStr) -> Self {
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

    /// The specification from which this version would create this set.
    pub(super) fn spec(&self) -> SetSpec {
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
        // SAFETY: the set is valid; the data is `len` bytes long, lives as long as the set, and is copied.
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
        // SAFETY: `self` owns the set, which is not used again; the call frees its elements too.
        unsafe { sys::nftnl_set_free(self.0.as_ptr()) }
    }
}

/// # Safety
///
/// `text` must be null or a NUL-terminated string.
pub(super) unsafe fn owned_string(text: *const libc::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: forwarded to the caller.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

pub(super) struct SetMessage<'a> {
    pub(super) table: &'a Table,
    pub(super) spec: &'a SetSpec,
    pub(super) id: u32,
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

/// `NFT_OBJECT_COUNTER`.
pub(crate) const OBJECT_COUNTER: u32 = 1;

/// An owned `nftnl_obj` that is a counter.
pub(super) struct RawCounter(pub(super) NonNull<sys::nftnl_obj>);

impl RawCounter {
    pub(super) fn new(table: &Table) -> Self {
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
        // SAFETY: `self` owns the object, which is not used again.
        unsafe { sys::nftnl_obj_free(self.0.as_ptr()) }
    }
}

pub(super) struct CounterMessage<'a> {
    pub(super) table: &'a Table,
    pub(super) name: CString,
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

/// The object that a [`NamedMessage`] deletes.
pub(super) enum Named {
    Set,
    /// All rules of a chain.
    RulesOf,
}

/// A message that has only a name as payload.
pub(super) struct NamedMessage<'a> {
    pub(super) table: &'a Table,
    pub(super) object: Named,
    pub(super) name: CString,
}

// SAFETY: a header and two names.
unsafe impl NlMsg for NamedMessage<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        match self.object {
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

/// A regular chain with user data, which `nftnl::Chain` cannot have.
pub(super) struct ChainMessage<'a> {
    pub(super) table: &'a Table,
    pub(super) spec: &'a ChainSpec,
}

// SAFETY: a header, two names and at most 256 bytes of user data.
unsafe impl NlMsg for ChainMessage<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        let ChainSpec { name, userdata, .. } = self.spec;
        let (family, name) = (self.table.get_family(), c_string(name));
        // SAFETY: `buffer` is as large as the trait promises; the chain is allocated, filled with copies, and freed
        // here.
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

pub(super) struct ElementsMessage<'a> {
    pub(super) table: &'a Table,
    pub(super) set: &'a CStr,
    pub(super) elements: &'a [Element],
    pub(super) kind: MsgType,
    /// `NLM_F_*`.
    pub(super) flags: i32,
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
            // SAFETY: both are valid; the set owns the element from here on.
            unsafe { sys::nftnl_set_elem_add(set.0.as_ptr(), raw) }
        }
        set
    }
}

// SAFETY: `batch` puts no more than BYTES_A_MESSAGE of elements into one; with two names that is less than the largest.
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
