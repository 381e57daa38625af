//! The kernel programs that weir carries load into this kernel and do their work there.

use std::{
    fs::File,
    net::{TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    maps::PerCpuArray,
    programs::{CgroupAttachMode, CgroupSockAddr},
};
use weir_tests::cgroup::Cgroup;

/// Connects to a port on loopback from a new thread, which first enters `cgroup` if there is one.
fn connect(port: u16, cgroup: Option<&Cgroup>) -> Result<()> {
    let inside = || {
        cgroup.map_or(Ok(()), Cgroup::enter)?;
        TcpStream::connect(("127.0.0.1", port)).map(drop)
    };
    let connected = thread::scope(|scope| scope.spawn(inside).join());
    connected.map_err(|_| anyhow!("the client died"))?.with_context(|| format!("connecting from {cgroup:?}"))
}

fn connects(ebpf: &Ebpf) -> Result<u64> {
    let counters = PerCpuArray::<_, u64>::try_from(ebpf.map("CONNECTS").context("there is no such map")?)?;
    Ok(counters.get(&0, 0)?.iter().sum())
}

fn connect4(ebpf: &mut Ebpf) -> Result<&mut CgroupSockAddr> {
    Ok(ebpf.program_mut("connect4").context("there is no such program")?.try_into()?)
}

#[test]
fn the_socket_hook_sees_the_connects_of_its_cgroup_and_no_others() -> Result<()> {
    let [node, other] = [Cgroup::new("node")?, Cgroup::new("other")?];
    let pod = node.child("pod")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let mut ebpf = Ebpf::load(weir::dataplane::ebpf::PROGRAMS)?;
    connect4(&mut ebpf)?.load()?;
    // Of links there may be several whatever is asked for, and creating one refuses the flag that would ask for it.
    let link = connect4(&mut ebpf)?.attach(File::open(node.path())?, CgroupAttachMode::Single)?;

    connect(port, None)?;
    connect(port, Some(&other))?;
    assert_eq!(connects(&ebpf)?, 0, "a thread outside is none of the hook's business");
    connect(port, Some(&node))?;
    connect(port, Some(&pod))?;
    assert_eq!(connects(&ebpf)?, 2);

    connect4(&mut ebpf)?.detach(link)?;
    connect(port, Some(&node))?;
    assert_eq!(connects(&ebpf)?, 2, "a detached program sees nothing");
    Ok(())
}
