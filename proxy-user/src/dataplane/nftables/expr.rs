//! Expressions of rules, one constructor each, in the registers that `nft` itself would use.
//!
//! In: constants and names. Out: [`Expr`]s. Registers are numbered in words of 4 bytes; [`VERDICT`] is the verdict's.

use std::ffi::CString;

use nftnl::nftnl_sys::{self as sys, libc};
use smallvec::SmallVec;

use crate::model::Family;
use crate::sys::libnftnl::{
    Attribute::{self, Bytes, Name, U8, U32, U64},
    Expr,
};

/// The register of verdicts.
pub(super) const VERDICT: u32 = 0;

/// The register of the `word`th 4-byte word.
pub(super) const fn word(word: u32) -> u32 {
    libc::NFT_REG32_00 as u32 + word
}

/// How many words an address of the family takes.
pub(super) const fn address_words(family: Family) -> u32 {
    address_len(family) / 4
}

/// How many bytes an address of the family takes.
pub(super) const fn address_len(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

fn name(text: &str) -> Attribute {
    Name(CString::new(text).unwrap_or_default())
}

fn bytes(data: &[u8]) -> Attribute {
    Bytes(SmallVec::from_slice(data))
}

fn payload(base: i32, offset: u32, len: u32, dreg: u32) -> Expr {
    Expr {
        kind: c"payload",
        attributes: vec![
            (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(base as u32)),
            (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(offset)),
            (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(len)),
            (sys::NFTNL_EXPR_PAYLOAD_DREG, U32(dreg)),
        ],
    }
}

/// `ip saddr`.
pub(super) fn source_address(family: Family, dreg: u32) -> Expr {
    let offset = if family == Family::V4 { 12 } else { 8 };
    payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, address_len(family), dreg)
}

/// `ip daddr`.
pub(super) fn destination_address(family: Family, dreg: u32) -> Expr {
    let offset = if family == Family::V4 { 16 } else { 24 };
    payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, address_len(family), dreg)
}

/// `th sport`.
pub(super) fn source_port(dreg: u32) -> Expr {
    payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2, dreg)
}

/// `th dport`.
pub(super) fn destination_port(dreg: u32) -> Expr {
    payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, dreg)
}

/// Writes a register into the packet. The kernel updates the header's checksum at `checksum`, if it has one, and the
/// transport's, unless the sender made none.
fn write_payload(base: i32, offset: u32, len: u32, sreg: u32, checksum: Option<u32>) -> Expr {
    const NFT_PAYLOAD_CSUM_INET: u32 = 1;
    const NFT_PAYLOAD_L4CSUM_PSEUDOHDR: u32 = 1;
    let kind = if checksum.is_some() { NFT_PAYLOAD_CSUM_INET } else { 0 };
    Expr {
        kind: c"payload",
        attributes: vec![
            (sys::NFTNL_EXPR_PAYLOAD_SREG, U32(sreg)),
            (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(base as u32)),
            (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(offset)),
            (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(len)),
            (sys::NFTNL_EXPR_PAYLOAD_CSUM_TYPE, U32(kind)),
            (sys::NFTNL_EXPR_PAYLOAD_CSUM_OFFSET, U32(checksum.unwrap_or_default())),
            (sys::NFTNL_EXPR_PAYLOAD_FLAGS, U32(NFT_PAYLOAD_L4CSUM_PSEUDOHDR)),
        ],
    }
}

/// `ip daddr set`.
pub(super) fn set_destination_address(family: Family, sreg: u32) -> Expr {
    const HEADER_CHECKSUM: u32 = 10;
    let (offset, checksum) = match family {
        Family::V4 => (16, Some(HEADER_CHECKSUM)),
        Family::V6 => (24, None),
    };
    write_payload(libc::NFT_PAYLOAD_NETWORK_HEADER, offset, address_len(family), sreg, checksum)
}

/// `udp dport set`. The flag makes the kernel leave datagrams without a checksum as they are.
pub(super) fn set_destination_port(sreg: u32) -> Expr {
    write_payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, sreg, None)
}

fn meta(key: i32, dreg: u32) -> Expr {
    Expr {
        kind: c"meta",
        attributes: vec![(sys::NFTNL_EXPR_META_KEY, U32(key as u32)), (sys::NFTNL_EXPR_META_DREG, U32(dreg))],
    }
}

fn meta_set(key: i32, sreg: u32) -> Expr {
    Expr {
        kind: c"meta",
        attributes: vec![(sys::NFTNL_EXPR_META_KEY, U32(key as u32)), (sys::NFTNL_EXPR_META_SREG, U32(sreg))],
    }
}

/// `meta l4proto`.
pub(super) fn protocol(dreg: u32) -> Expr {
    meta(libc::NFT_META_L4PROTO, dreg)
}

/// `meta mark`.
pub(super) fn mark(dreg: u32) -> Expr {
    meta(libc::NFT_META_MARK, dreg)
}

/// `meta mark set`.
pub(super) fn set_mark(sreg: u32) -> Expr {
    meta_set(libc::NFT_META_MARK, sreg)
}

/// `meta priority set`.
pub(super) fn set_priority(sreg: u32) -> Expr {
    meta_set(libc::NFT_META_PRIORITY, sreg)
}

/// `meta priority`.
pub(super) fn priority(dreg: u32) -> Expr {
    meta(libc::NFT_META_PRIORITY, dreg)
}

/// `iifname`, 16 bytes.
pub(super) fn input_interface(dreg: u32) -> Expr {
    meta(libc::NFT_META_IIFNAME, dreg)
}

/// `oifname`, 16 bytes.
pub(super) fn output_interface(dreg: u32) -> Expr {
    meta(libc::NFT_META_OIFNAME, dreg)
}

/// Compares a register with bytes.
pub(super) fn compare(sreg: u32, equal: bool, data: &[u8]) -> Expr {
    let op = if equal { libc::NFT_CMP_EQ } else { libc::NFT_CMP_NEQ };
    Expr {
        kind: c"cmp",
        attributes: vec![
            (sys::NFTNL_EXPR_CMP_SREG, U32(sreg)),
            (sys::NFTNL_EXPR_CMP_OP, U32(op as u32)),
            (sys::NFTNL_EXPR_CMP_DATA, bytes(data)),
        ],
    }
}

/// `register = (register & mask) ^ xor`.
pub(super) fn bitwise(register: u32, mask: &[u8], xor: &[u8]) -> Expr {
    Expr {
        kind: c"bitwise",
        attributes: vec![
            (sys::NFTNL_EXPR_BITWISE_SREG, U32(register)),
            (sys::NFTNL_EXPR_BITWISE_DREG, U32(register)),
            (sys::NFTNL_EXPR_BITWISE_LEN, U32(mask.len() as u32)),
            (sys::NFTNL_EXPR_BITWISE_MASK, bytes(mask)),
            (sys::NFTNL_EXPR_BITWISE_XOR, bytes(xor)),
        ],
    }
}

/// Matches when the key is in the set.
pub(super) fn in_set(sreg: u32, set: &str) -> Expr {
    Expr {
        kind: c"lookup",
        attributes: vec![(sys::NFTNL_EXPR_LOOKUP_SREG, U32(sreg)), (sys::NFTNL_EXPR_LOOKUP_SET, name(set))],
    }
}

/// Matches when the key is not in the set.
pub(super) fn not_in_set(sreg: u32, set: &str) -> Expr {
    let mut lookup = in_set(sreg, set);
    lookup.attributes.push((sys::NFTNL_EXPR_LOOKUP_FLAGS, U32(libc::NFT_LOOKUP_F_INV as u32)));
    lookup
}

/// Loads the key's value into a register, or takes its verdict. A missing key ends the rule.
pub(super) fn map(sreg: u32, map: &str, dreg: u32) -> Expr {
    let mut lookup = in_set(sreg, map);
    lookup.attributes.push((sys::NFTNL_EXPR_LOOKUP_DREG, U32(dreg)));
    lookup
}

pub(super) fn constant(dreg: u32, data: &[u8]) -> Expr {
    Expr {
        kind: c"immediate",
        attributes: vec![(sys::NFTNL_EXPR_IMM_DREG, U32(dreg)), (sys::NFTNL_EXPR_IMM_DATA, bytes(data))],
    }
}

fn verdict(code: i32) -> Expr {
    Expr {
        kind: c"immediate",
        attributes: vec![
            (sys::NFTNL_EXPR_IMM_DREG, U32(VERDICT)),
            (sys::NFTNL_EXPR_IMM_VERDICT, U32(code as u32)),
        ],
    }
}

/// `accept`, which ends this base chain.
pub(super) fn accept() -> Expr {
    verdict(libc::NF_ACCEPT)
}

/// `notrack`.
pub(super) fn untracked() -> Expr {
    Expr { kind: c"notrack", attributes: Vec::new() }
}

/// `counter name NAME`.
pub(super) fn count(counter: &str) -> Expr {
    Expr {
        kind: c"objref",
        attributes: vec![
            (sys::NFTNL_EXPR_OBJREF_IMM_TYPE, U32(crate::sys::libnftnl::OBJECT_COUNTER)),
            (sys::NFTNL_EXPR_OBJREF_IMM_NAME, name(counter)),
        ],
    }
}

/// `drop`.
pub(super) fn drop() -> Expr {
    verdict(libc::NF_DROP)
}

fn to_chain(code: i32, chain: &str) -> Expr {
    let mut verdict = verdict(code);
    verdict.attributes.push((sys::NFTNL_EXPR_IMM_CHAIN, name(chain)));
    verdict
}

/// `jump CHAIN`.
pub(super) fn jump(chain: &str) -> Expr {
    to_chain(libc::NFT_JUMP, chain)
}

/// `goto CHAIN`.
pub(super) fn goto(chain: &str) -> Expr {
    to_chain(libc::NFT_GOTO, chain)
}

/// `numgen random mod MODULUS offset OFFSET`.
pub(super) fn random(modulus: u32, offset: u32, dreg: u32) -> Expr {
    Expr {
        kind: c"numgen",
        attributes: vec![
            (sys::NFTNL_EXPR_NG_DREG, U32(dreg)),
            (sys::NFTNL_EXPR_NG_MODULUS, U32(modulus)),
            (sys::NFTNL_EXPR_NG_TYPE, U32(libc::NFT_NG_RANDOM as u32)),
            (sys::NFTNL_EXPR_NG_OFFSET, U32(offset)),
        ],
    }
}

const NF_NAT_RANGE_MAP_IPS: u32 = 1;
const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 2;
const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 16;

/// `dnat to` the address and port in the registers from the first word on.
pub(super) fn dnat(family: Family) -> Expr {
    let (address, port) = (word(0), word(address_words(family)));
    let protocol = match family {
        Family::V4 => libc::NFPROTO_IPV4,
        Family::V6 => libc::NFPROTO_IPV6,
    };
    Expr {
        kind: c"nat",
        attributes: vec![
            (sys::NFTNL_EXPR_NAT_TYPE, U32(libc::NFT_NAT_DNAT as u32)),
            (sys::NFTNL_EXPR_NAT_FAMILY, U32(protocol as u32)),
            (sys::NFTNL_EXPR_NAT_REG_ADDR_MIN, U32(address)),
            (sys::NFTNL_EXPR_NAT_REG_ADDR_MAX, U32(address)),
            (sys::NFTNL_EXPR_NAT_REG_PROTO_MIN, U32(port)),
            (sys::NFTNL_EXPR_NAT_REG_PROTO_MAX, U32(port)),
            (sys::NFTNL_EXPR_NAT_FLAGS, U32(NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED)),
        ],
    }
}

/// `masquerade fully-random` (R8).
pub(super) fn masquerade() -> Expr {
    Expr {
        kind: c"masq",
        attributes: vec![(sys::NFTNL_EXPR_MASQ_FLAGS, U32(NF_NAT_RANGE_PROTO_RANDOM_FULLY))],
    }
}

const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_SADDR: u32 = 1;
const NFTA_FIB_F_DADDR: u32 = 2;
const RTN_LOCAL: u32 = 2;

fn fib_local(flags: u32, local: bool) -> [Expr; 2] {
    let fib = Expr {
        kind: c"fib",
        attributes: vec![
            (sys::NFTNL_EXPR_FIB_DREG, U32(word(0))),
            (sys::NFTNL_EXPR_FIB_RESULT, U32(NFT_FIB_RESULT_ADDRTYPE)),
            (sys::NFTNL_EXPR_FIB_FLAGS, U32(flags)),
        ],
    };
    [fib, compare(word(0), local, &RTN_LOCAL.to_ne_bytes())]
}

/// `fib saddr type local`, or its negation.
pub(super) fn source_is_local(local: bool) -> [Expr; 2] {
    fib_local(NFTA_FIB_F_SADDR, local)
}

/// `fib daddr type local`.
pub(super) fn destination_is_local() -> [Expr; 2] {
    fib_local(NFTA_FIB_F_DADDR, true)
}

/// `oif lo`: the loopback device is the first of every network namespace.
pub(super) fn through_loopback() -> [Expr; 2] {
    [meta(libc::NFT_META_OIF, word(0)), compare(word(0), true, &1_u32.to_ne_bytes())]
}

fn ct(key: i32, dreg: u32) -> Expr {
    Expr {
        kind: c"ct",
        attributes: vec![(sys::NFTNL_EXPR_CT_KEY, U32(key as u32)), (sys::NFTNL_EXPR_CT_DREG, U32(dreg))],
    }
}

fn ct_bit(key: i32, bit: u32, set: bool) -> [Expr; 3] {
    [ct(key, word(0)), bitwise(word(0), &bit.to_ne_bytes(), &[0; 4]), compare(word(0), !set, &[0; 4])]
}

const NF_CT_STATE_INVALID: u32 = 1;
const NF_CT_STATE_ESTABLISHED: u32 = 1 << 1;
const NF_CT_STATE_RELATED: u32 = 1 << 2;
const NF_CT_STATE_NEW: u32 = 1 << 3;

/// `ct state established,related`.
pub(super) fn known_flow() -> [Expr; 3] {
    ct_bit(libc::NFT_CT_STATE, NF_CT_STATE_ESTABLISHED | NF_CT_STATE_RELATED, true)
}

/// `ct state invalid meta l4proto tcp`.
pub(super) fn fits_no_connection() -> Vec<Expr> {
    let tcp = [protocol(word(0)), compare(word(0), true, &[libc::IPPROTO_TCP as u8])];
    [ct_bit(libc::NFT_CT_STATE, NF_CT_STATE_INVALID, true).to_vec(), tcp.to_vec()].concat()
}

/// `ct state new`.
pub(super) fn new_flow() -> [Expr; 3] {
    ct_bit(libc::NFT_CT_STATE, NF_CT_STATE_NEW, true)
}

/// `ct state ! new`.
pub(super) fn no_new_flow() -> [Expr; 3] {
    ct_bit(libc::NFT_CT_STATE, NF_CT_STATE_NEW, false)
}

/// `ct status dnat`.
pub(super) fn translated() -> [Expr; 3] {
    const IPS_DST_NAT: u32 = 1 << 5;
    ct_bit(libc::NFT_CT_STATUS, IPS_DST_NAT, true)
}

/// `reject`: ICMP port unreachable, whatever the protocol (note under F7).
pub(super) fn reject(family: Family) -> Expr {
    let code: u8 = match family {
        Family::V4 => 3,
        Family::V6 => 4,
    };
    Expr {
        kind: c"reject",
        attributes: vec![
            (sys::NFTNL_EXPR_REJECT_TYPE, U32(libc::NFT_REJECT_ICMP_UNREACH as u32)),
            (sys::NFTNL_EXPR_REJECT_CODE, U8(code)),
        ],
    }
}

fn write_from_packet(map: &str, operation: i32, key: u32, data: u32) -> Expr {
    Expr {
        kind: c"dynset",
        attributes: vec![
            (sys::NFTNL_EXPR_DYNSET_SET_NAME, name(map)),
            (sys::NFTNL_EXPR_DYNSET_OP, U32(operation as u32)),
            (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(key)),
            (sys::NFTNL_EXPR_DYNSET_SREG_DATA, U32(data)),
        ],
    }
}

/// `update @MAP { key timeout SECONDS : data }`. An existing element gets the timeout and keeps its data. A full map
/// ends the rule.
pub(super) fn remember(map: &str, key: u32, data: u32, seconds: u32) -> Expr {
    let mut update = write_from_packet(map, libc::NFT_DYNSET_OP_UPDATE, key, data);
    update.attributes.push((sys::NFTNL_EXPR_DYNSET_TIMEOUT, U64(u64::from(seconds) * 1000)));
    update
}

/// `update @SET { key timeout SECONDS }`. A full set ends the rule.
pub(super) fn note(set: &str, key: u32, seconds: u32) -> Expr {
    Expr {
        kind: c"dynset",
        attributes: vec![
            (sys::NFTNL_EXPR_DYNSET_SET_NAME, name(set)),
            (sys::NFTNL_EXPR_DYNSET_OP, U32(libc::NFT_DYNSET_OP_UPDATE as u32)),
            (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(key)),
            (sys::NFTNL_EXPR_DYNSET_TIMEOUT, U64(u64::from(seconds) * 1000)),
        ],
    }
}

/// `delete @MAP { key : data }`. The kernel does not compare the data.
pub(super) fn forget(map: &str, key: u32, data: u32) -> Expr {
    const NFT_DYNSET_OP_DELETE: i32 = 2;
    write_from_packet(map, NFT_DYNSET_OP_DELETE, key, data)
}

/// `update @SET { key timeout SECONDS limit rate over RATE/second burst BURST packets }`, which matches keys above that
/// rate. A full set ends the rule.
pub(super) fn too_often(set: &str, key: u32, seconds: u32, rate: u64, burst: u32) -> Expr {
    const NFT_LIMIT_F_INV: u32 = 1;
    const ONE_SECOND: u64 = 1;
    let limit = Expr {
        kind: c"limit",
        attributes: vec![
            (sys::NFTNL_EXPR_LIMIT_RATE, U64(rate)),
            (sys::NFTNL_EXPR_LIMIT_UNIT, U64(ONE_SECOND)),
            (sys::NFTNL_EXPR_LIMIT_BURST, U32(burst)),
            (sys::NFTNL_EXPR_LIMIT_TYPE, U32(libc::NFT_LIMIT_PKTS as u32)),
            (sys::NFTNL_EXPR_LIMIT_FLAGS, U32(NFT_LIMIT_F_INV)),
        ],
    };
    Expr {
        kind: c"dynset",
        attributes: vec![
            (sys::NFTNL_EXPR_DYNSET_SET_NAME, name(set)),
            (sys::NFTNL_EXPR_DYNSET_OP, U32(libc::NFT_DYNSET_OP_UPDATE as u32)),
            (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(key)),
            (sys::NFTNL_EXPR_DYNSET_TIMEOUT, U64(u64::from(seconds) * 1000)),
            (sys::NFTNL_EXPR_DYNSET_EXPR, Attribute::Expr(Box::new(limit))),
        ],
    }
}
