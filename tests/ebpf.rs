//! The kernel programs that weir carries load into this kernel and do their work there.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use aya::{
    Ebpf,
    maps::PerCpuArray,
    programs::{CgroupAttachMode, CgroupSockAddr},
};

/// A group of processes of its own, gone when this is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let path = cgroup2_root().join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap_or_else(|error| panic!("root is needed to make {}: {error}", path.display()));
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{} is left behind: {error}", self.0.display());
        }
    }
}

/// Where cgroup v2 is mounted: not in the same place on hybrid and on unified systems.
fn cgroup2_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let root = mounts.lines().find_map(|mount| {
        let mut fields = mount.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    root.expect("no cgroup v2 hierarchy is mounted")
}

/// Connects to `port` on loopback from a new process, which first enters `cgroup` if there is one.
fn connect(port: u16, cgroup: Option<&Path>) {
    let mut shell = Command::new("bash");
    shell.args(["-ec", "[ -z \"$2\" ] || echo $$ >\"$2/cgroup.procs\"; exec 3<>/dev/tcp/127.0.0.1/$1", "bash"]);
    shell.arg(port.to_string()).arg(cgroup.unwrap_or(Path::new("")));
    assert!(shell.status().unwrap().success(), "connecting to port {port} from {cgroup:?}");
}

fn connects(ebpf: &Ebpf) -> u64 {
    let counters = PerCpuArray::<_, u64>::try_from(ebpf.map("CONNECTS").unwrap()).unwrap();
    counters.get(&0, 0).unwrap().iter().sum()
}

#[test]
fn the_socket_hook_sees_the_connects_of_its_cgroup_and_no_others() {
    let cgroup = Cgroup::new("weir-test-ebpf");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut ebpf = Ebpf::load(weir::dataplane::ebpf::PROGRAMS).unwrap();
    let program: &mut CgroupSockAddr = ebpf.program_mut("connect4").unwrap().try_into().unwrap();
    program.load().unwrap();
    let directory = File::open(&cgroup.0).unwrap();
    // Links may be several whatever is asked for, and creating one refuses the flag that would ask for it.
    let link = program.attach(directory, CgroupAttachMode::Single).unwrap();

    connect(port, None);
    assert_eq!(connects(&ebpf), 0, "a process outside is none of the hook's business");
    connect(port, Some(&cgroup.0));
    connect(port, Some(&cgroup.0));
    assert_eq!(connects(&ebpf), 2);

    let program: &mut CgroupSockAddr = ebpf.program_mut("connect4").unwrap().try_into().unwrap();
    program.detach(link).unwrap();
    connect(port, Some(&cgroup.0));
    assert_eq!(connects(&ebpf), 2, "a detached program sees nothing");
}
