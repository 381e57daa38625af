//! The kernel programs that weir carries load into this kernel and do their work there.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::PerCpuArray,
    programs::{CgroupAttachMode, CgroupSockAddr},
};

/// A group of processes of its own, gone when this is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Result<Self> {
        let path = cgroup2_root()?.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {} needs root", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.0);
        // A second panic would hide the first.
        assert!(
            removed.is_ok() || std::thread::panicking(),
            "{} is left behind: {removed:?}",
            self.0.display()
        );
    }
}

/// Where cgroup v2 is mounted: not in the same place on hybrid and on unified systems.
fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let root = mounts.lines().find_map(|mount| {
        let mut fields = mount.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    root.context("no cgroup v2 hierarchy is mounted")
}

/// Connects to `port` on loopback from a new process, which first enters `cgroup` if there is one.
fn connect(port: u16, cgroup: Option<&Path>) -> Result<()> {
    const SCRIPT: &str = "[ -z \"$2\" ] || echo $$ >\"$2/cgroup.procs\"; exec 3<>/dev/tcp/127.0.0.1/$1";
    let mut shell = Command::new("bash");
    shell.args(["-ec", SCRIPT, "bash"]).arg(port.to_string()).arg(cgroup.unwrap_or(Path::new("")));
    ensure!(shell.status()?.success(), "connecting to port {port} from {cgroup:?}");
    Ok(())
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
    let cgroup = Cgroup::new("weir-test-ebpf")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let mut ebpf = Ebpf::load(weir::dataplane::ebpf::PROGRAMS)?;
    connect4(&mut ebpf)?.load()?;
    // Of links there may be several whatever is asked for, and creating one refuses the flag that would ask for it.
    let link = connect4(&mut ebpf)?.attach(File::open(&cgroup.0)?, CgroupAttachMode::Single)?;

    connect(port, None)?;
    assert_eq!(connects(&ebpf)?, 0, "a process outside is none of the hook's business");
    connect(port, Some(&cgroup.0))?;
    connect(port, Some(&cgroup.0))?;
    assert_eq!(connects(&ebpf)?, 2);

    connect4(&mut ebpf)?.detach(link)?;
    connect(port, Some(&cgroup.0))?;
    assert_eq!(connects(&ebpf)?, 2, "a detached program sees nothing");
    Ok(())
}
