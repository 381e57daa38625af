//! Requests to the kernel, and its answers.
//!
//! In: names; the messages of an answer. Out: requests; sets, chains, counters and elements as plain Rust values.

use std::ffi::c_void;

use nftnl::{
    Table,
    nftnl_sys::{self as sys, libc},
};

use super::{
    messages::{RawCounter, RawSet, allocated, header, owned_string},
    objects::{Bytes, Element, Hooked, SetSpec, Value, c_string},
};

/// The objects that one dump lists.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dump<'a> {
    /// Every set and map of the table.
    Sets,
    /// Every counter of the table.
    Counters,
    /// Every chain of the family, also of other tables.
    Chains,
    /// The elements of one set.
    Elements(&'a str),
}

pub(crate) fn dump_request(table: &Table, dump: Dump<'_>, seq: u32) -> Vec<u8> {
    let mut buffer = vec![0u8; 4096];
    let raw = buffer.as_mut_ptr().cast::<c_void>();
    let family = table.get_family();
    // SAFETY: 4096 bytes hold a header and two names of at most 256 bytes; the set outlives the calls.
    let len = unsafe {
        match dump {
            Dump::Chains => (*header(raw, libc::NFT_MSG_GETCHAIN, family, libc::NLM_F_DUMP, seq)).nlmsg_len,
            Dump::Sets => {
                let header = header(raw, libc::NFT_MSG_GETSET, family, libc::NLM_F_DUMP, seq);
                let set = RawSet::new(table, c"");
                sys::nftnl_set_nlmsg_build_payload(header, set.0.as_ptr());
                (*header).nlmsg_len
            }
            Dump::Counters => {
                let header = header(raw, libc::NFT_MSG_GETOBJ, family, libc::NLM_F_DUMP, seq);
                let counter = RawCounter::new(table);
                sys::nftnl_obj_nlmsg_build_payload(header, counter.0.as_ptr());
                (*header).nlmsg_len
            }
            Dump::Elements(name) => {
                let header = header(raw, libc::NFT_MSG_GETSETELEM, family, libc::NLM_F_DUMP, seq);
                let set = RawSet::new(table, &c_string(name));
                sys::nftnl_set_elems_nlmsg_build_payload(header, set.0.as_ptr());
                (*header).nlmsg_len
            }
        }
    };
    buffer.truncate(len as usize);
    buffer
}

/// Requests the element of one set under `key`. The answer is one message as of a [`Dump::Elements`] and an
/// acknowledgement, or `ENOENT`.
pub(crate) fn get_request(table: &Table, set: &str, key: &[u8], seq: u32) -> Vec<u8> {
    let mut buffer = vec![0u8; 4096];
    let raw = buffer.as_mut_ptr().cast::<c_void>();
    let set = RawSet::new(table, &c_string(set));
    // SAFETY: 4096 bytes hold a header, two names of at most 256 bytes and a key of at most 64, which libnftnl copies;
    // the set owns the element from where it is added, and outlives the calls.
    let len = unsafe {
        let element = allocated(sys::nftnl_set_elem_alloc()).as_ptr();
        let attribute = sys::NFTNL_SET_ELEM_KEY as u16;
        sys::nftnl_set_elem_set(element, attribute, key.as_ptr().cast(), key.len() as u32);
        sys::nftnl_set_elem_add(set.0.as_ptr(), element);
        let header = header(raw, libc::NFT_MSG_GETSETELEM, table.get_family(), libc::NLM_F_ACK, seq);
        sys::nftnl_set_elems_nlmsg_build_payload(header, set.0.as_ptr());
        (*header).nlmsg_len
    };
    buffer.truncate(len as usize);
    buffer
}

/// The header of a message, if the message is long enough and aligned.
fn checked(message: &[u8]) -> Option<*const libc::nlmsghdr> {
    let header = message.as_ptr().cast::<libc::nlmsghdr>();
    (message.len() >= size_of::<libc::nlmsghdr>() && header.is_aligned()).then_some(header)
}

/// Reads one message of a [`Dump::Sets`].
pub(crate) fn parse_set(table: &Table, message: &[u8]) -> Option<SetSpec> {
    let header = checked(message)?;
    let set = RawSet::new(table, c"");
    // SAFETY: `header` starts a whole message, and `set` is valid.
    if unsafe { sys::nftnl_set_nlmsg_parse(header, set.0.as_ptr()) } < 0 {
        return None;
    }
    Some(set.spec())
}

/// A chain in the kernel.
pub(crate) struct ReadChain {
    pub(crate) table: String,
    pub(crate) name: String,
    pub(crate) hooked: Option<Hooked>,
}

/// Reads one message of a [`Dump::Chains`].
pub(crate) fn parse_chain(message: &[u8]) -> Option<ReadChain> {
    let header = checked(message)?;
    // SAFETY: `header` starts a whole message; the chain is freed before return, after its strings were copied.
    unsafe {
        let chain = allocated(sys::nftnl_chain_alloc()).as_ptr();
        let parsed = sys::nftnl_chain_nlmsg_parse(header, chain) >= 0;
        let text = |attribute: u32| owned_string(sys::nftnl_chain_get_str(chain, attribute as u16));
        let hooked = sys::nftnl_chain_is_set(chain, sys::NFTNL_CHAIN_HOOKNUM as u16).then(|| {
            let hook = sys::nftnl_chain_get_u32(chain, sys::NFTNL_CHAIN_HOOKNUM as u16);
            let priority = sys::nftnl_chain_get_s32(chain, sys::NFTNL_CHAIN_PRIO as u16);
            (text(sys::NFTNL_CHAIN_TYPE), hook, priority)
        });
        let read = parsed.then(|| ReadChain {
            table: text(sys::NFTNL_CHAIN_TABLE),
            name: text(sys::NFTNL_CHAIN_NAME),
            hooked,
        });
        sys::nftnl_chain_free(chain);
        read
    }
}

/// Reads name and packets of a counter from one message of a [`Dump::Counters`].
pub(crate) fn parse_counter(table: &Table, message: &[u8]) -> Option<(String, u64)> {
    let header = checked(message)?;
    let counter = RawCounter::new(table);
    let raw = counter.0.as_ptr();
    // SAFETY: `header` starts a whole message, and the counter is valid; its name is copied.
    unsafe {
        if sys::nftnl_obj_nlmsg_parse(header, raw) < 0 {
            return None;
        }
        let name = owned_string(sys::nftnl_obj_get_str(raw, sys::NFTNL_OBJ_NAME as u16));
        Some((name, sys::nftnl_obj_get_u64(raw, sys::NFTNL_OBJ_CTR_PKTS as u16)))
    }
}

/// Passes every element of one message of a [`Dump::Elements`] to `each`.
pub(crate) fn parse_elements(table: &Table, message: &[u8], mut each: impl FnMut(Element)) -> Option<()> {
    let header = checked(message)?;
    let set = RawSet::new(table, c"");
    // SAFETY: `header` starts a whole message, and `set` is valid.
    if unsafe { sys::nftnl_set_elems_nlmsg_parse(header, set.0.as_ptr()) } < 0 {
        return None;
    }
    // SAFETY: the iterator is used and destroyed while the set lives; elements are only read.
    unsafe {
        let iterator = allocated(sys::nftnl_set_elems_iter_create(set.0.as_ptr())).as_ptr();
        loop {
            let element = sys::nftnl_set_elems_iter_next(iterator);
            if element.is_null() {
                break;
            }
            each(read_element(element));
        }
        sys::nftnl_set_elems_iter_destroy(iterator);
    }
    Some(())
}

/// # Safety
///
/// `element` must be valid.
unsafe fn read_element(element: *mut sys::nftnl_set_elem) -> Element {
    // SAFETY: `element` is valid; the data that the getters point to lives as long as the element, and is copied.
    unsafe {
        let is_set = |attribute: u32| sys::nftnl_set_elem_is_set(element, attribute as u16);
        let bytes = |attribute: u32| -> Bytes {
            let mut len = 0;
            let data = sys::nftnl_set_elem_get(element, attribute as u16, &raw mut len).cast::<u8>();
            if data.is_null() { Bytes::new() } else { std::slice::from_raw_parts(data, len as usize).into() }
        };
        let value = if is_set(sys::NFTNL_SET_ELEM_CHAIN) {
            Value::Goto(owned_string(sys::nftnl_set_elem_get_str(element, sys::NFTNL_SET_ELEM_CHAIN as u16)))
        } else if is_set(sys::NFTNL_SET_ELEM_VERDICT) {
            let code = sys::nftnl_set_elem_get_u32(element, sys::NFTNL_SET_ELEM_VERDICT as u16);
            Value::Accept(code == libc::NF_ACCEPT as u32)
        } else if is_set(sys::NFTNL_SET_ELEM_DATA) {
            Value::Data(bytes(sys::NFTNL_SET_ELEM_DATA))
        } else {
            Value::None
        };
        Element {
            key: bytes(sys::NFTNL_SET_ELEM_KEY),
            key_end: is_set(sys::NFTNL_SET_ELEM_KEY_END).then(|| bytes(sys::NFTNL_SET_ELEM_KEY_END)),
            value,
        }
    }
}

/// The kind of a message with the generation of the rule set.
pub(crate) const NEW_GENERATION: u16 = libc::NFT_MSG_NEWGEN as u16;

/// Requests the generation of the rule set. The answer is one message and an acknowledgement.
pub(crate) fn generation_request(seq: u32) -> Vec<u8> {
    const LEN: u32 = 20;
    let kind = (libc::NFNL_SUBSYS_NFTABLES << 8 | libc::NFT_MSG_GETGEN) as u16;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut request = Vec::with_capacity(LEN as usize);
    request.extend(LEN.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend(seq.to_ne_bytes());
    // The kernel fills in the sender, and does not read family, version and resource.
    request.extend([0; 8]);
    request
}

/// Reads the generation of the rule set from a message.
pub(crate) fn parse_generation(message: &[u8]) -> Option<u32> {
    const ATTRIBUTES: usize = 20;
    const GENERATION: u16 = 1;
    let mut rest = message.get(ATTRIBUTES..)?;
    loop {
        let (&[a, b, c, d], value) = rest.split_first_chunk::<4>()?;
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        if kind == GENERATION {
            return value.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes));
        }
        rest = rest.get(len.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_is_found_behind_other_attributes() {
        let mut message = generation_request(7);
        assert_eq!((message.len(), parse_generation(&message)), (20, None));
        message.extend([6, 0, 9, 0, 1, 2, 0, 0]);
        assert_eq!(parse_generation(&message), None);
        message.extend([8, 0, 1, 0, 0, 0, 1, 2]);
        assert_eq!(parse_generation(&message), Some(258));
        message.truncate(message.len() - 1);
        assert_eq!(parse_generation(&message), None, "cut off");
    }
}
