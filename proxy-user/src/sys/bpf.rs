//! System calls for eBPF programs, links and maps that `aya` does not have, and the agent's heap.
//!
//! In: descriptors. Out: the kernel's answers.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::maps::{Array, IterableMap as _, MapData, MapType};

/// Replaces the program behind a link at one instant (`BPF_LINK_UPDATE`, Linux 5.7).
///
/// # Errors
///
/// Kernel errors: `EINVAL` when the program is not of the link's kind, `ENOLINK` when its cgroup is gone.
pub fn update_link(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    const BPF_LINK_UPDATE: libc::c_int = 29;
    #[repr(C)]
    struct Attributes {
        link: u32,
        new_program: u32,
        flags: u32,
        old_program: u32,
    }
    let attributes = Attributes {
        link: number(link.as_fd().as_raw_fd())?,
        new_program: number(program.as_fd().as_raw_fd())?,
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the command reads `attributes`, which lives until the call returns, up to the size given and no further;
    // both descriptors are open for as long as their owners are borrowed.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_UPDATE, &raw const attributes, size_of::<Attributes>())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn number(fd: RawFd) -> io::Result<u32> {
    u32::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}

/// Opens what is pinned at a path (`BPF_OBJ_GET`).
///
/// # Errors
///
/// Kernel errors: `ENOENT` when there is nothing.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    const BPF_OBJ_GET: libc::c_int = 7;
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = Attributes { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the command reads `attributes` up to the size given and the string it points to, which ends with a zero;
    // both live until the call returns.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<Attributes>()) };
    let fd = libc::c_int::try_from(fd).map_err(|_| io::Error::other("not a descriptor"))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Where a link leads from and to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupLink {
    /// The program's id.
    pub program: u32,
    /// The id of the cgroup, which is its inode's number; 0 when the link is detached.
    pub cgroup: u64,
    /// Which hook.
    pub attach_type: u32,
}

/// Information about a link of a cgroup (`BPF_OBJ_GET_INFO_BY_FD`).
///
/// # Errors
///
/// Kernel errors.
pub fn cgroup_link(link: impl AsFd) -> io::Result<CgroupLink> {
    const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    /// `struct bpf_link_info` as far as its part about cgroups.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        padding: u32,
        cgroup: u64,
        attach_type: u32,
        rest: u32,
    }
    #[repr(C)]
    struct Attributes {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut info = Info::default();
    let attributes = Attributes {
        fd: number(link.as_fd().as_raw_fd())?,
        length: size_of::<Info>() as u32,
        info: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: the command reads `attributes` up to the size given, and writes no more of `info` than the length in there
    // says, which is its size; both live until the call returns.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &raw const attributes, size_of::<Attributes>())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(CgroupLink { program: info.program, cgroup: info.cgroup, attach_type: info.attach_type })
}

/// Attaches a program to a hook of a cgroup (`BPF_LINK_CREATE`, Linux 5.7), for as long as the descriptor or a pin lives.
///
/// # Errors
///
/// Kernel errors.
pub fn link_to_cgroup(program: impl AsFd, cgroup: impl AsFd, attach_type: u32) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: number(program.as_fd().as_raw_fd())?,
        target: number(cgroup.as_fd().as_raw_fd())?,
        attach_type,
        flags: 0,
    };
    // SAFETY: the command reads `attributes`, which lives until the call returns, up to the size given and no further;
    // both descriptors are open for as long as their owners are borrowed.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attributes, size_of::<Attributes>())
    };
    let fd = libc::c_int::try_from(fd).map_err(|_| io::Error::other("not a descriptor"))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives a link a path on a bpffs (`BPF_OBJ_PIN`).
///
/// # Errors
///
/// Kernel errors: `EEXIST` when the path is taken.
pub fn pin(link: impl AsFd, path: &Path) -> io::Result<()> {
    const BPF_OBJ_PIN: libc::c_int = 6;
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes =
        Attributes { path: path.as_ptr() as u64, fd: number(link.as_fd().as_raw_fd())?, flags: 0 };
    // SAFETY: the command reads `attributes` up to the size given and the string it points to, which ends with a zero;
    // both live until the call returns.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_PIN, &raw const attributes, size_of::<Attributes>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct` of `BPF_MAP_LOOKUP_BATCH` and `BPF_MAP_UPDATE_BATCH`.
#[repr(C)]
#[derive(Default)]
struct Batch {
    /// Where to go on; 0 for the beginning.
    in_batch: u64,
    /// Where the kernel writes where to go on.
    out_batch: u64,
    keys: u64,
    values: u64,
    /// How many elements there is room for; the kernel writes how many it took.
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

impl Batch {
    /// # Safety
    ///
    /// The pointers are to memory that is as large as `count` and the map's keys and values say and may be written.
    unsafe fn call(&mut self, command: libc::c_int) -> io::Result<()> {
        // SAFETY: the command reads and writes this, up to the size given, and what the caller answers for.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(self), size_of::<Self>()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Writes elements of an array that follow each other, with one call (`BPF_MAP_UPDATE_BATCH`, Linux 5.6): with one for
/// each, most of the time that filling 250,000 takes goes into entering the kernel.
///
/// # Errors
///
/// Kernel errors: `E2BIG` when there are not so many.
pub fn write_all<V: aya::Pod>(array: &Array<MapData, V>, first: u32, values: &[V]) -> io::Result<()> {
    const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
    let keys: Vec<u32> = (first..).take(values.len()).collect();
    let mut batch = Batch {
        keys: keys.as_ptr().expose_provenance() as u64,
        values: values.as_ptr().expose_provenance() as u64,
        count: u32::try_from(values.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        map: number(array.map().fd().as_fd().as_raw_fd())?,
        ..Batch::default()
    };
    // SAFETY: this command only reads keys and values, of which there are `count`, of the sizes the map has, as its type
    // was checked for; they live until the call returns, and the descriptor is open for as long as its owner is borrowed.
    unsafe { batch.call(BPF_MAP_UPDATE_BATCH) }
}

/// The elements of an array of words, in memory that the kernel shares with us (Linux 5.5): a store is seen by programs as a
/// whole, which the kernel does not promise of an element that it copies.
#[derive(Debug)]
pub struct Words {
    start: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the memory belongs to no thread, and is used by atomic loads and stores alone.
unsafe impl Send for Words {}

impl Words {
    /// Maps an array.
    ///
    /// # Errors
    ///
    /// Kernel errors; `EINVAL` when it is no array of words.
    pub fn of(array: &Array<MapData, u64>) -> io::Result<Self> {
        let count = array.len() as usize;
        let map = array.map().fd().as_fd().as_raw_fd();
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, at a place that the kernel chooses, of a descriptor that is open.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), count * size_of::<u64>(), protection, flags, map, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok(Self { start, count })
    }

    /// A word; nothing where there are not so many.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<u64> {
        self.word(index).map(|word| word.load(Ordering::Relaxed))
    }

    /// Stores a word, after everything that was written before.
    ///
    /// # Errors
    ///
    /// `E2BIG` when there are not so many.
    pub fn set(&self, index: u32, value: u64) -> io::Result<()> {
        let word = self.word(index).ok_or_else(|| io::Error::from_raw_os_error(libc::E2BIG))?;
        word.store(value, Ordering::SeqCst);
        Ok(())
    }

    fn word(&self, index: u32) -> Option<&AtomicU64> {
        let index = index as usize;
        // SAFETY: within the mapping, which begins at a page and lives as long as this.
        (index < self.count).then(|| unsafe { self.start.add(index).as_ref() })
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping that `of` made, to which no reference is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * size_of::<u64>()) };
    }
}

/// Reads a hash or an array, many elements with one call (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6). An element that is there
/// all the time is handed to `visit` once; to ask a hash for one key after the other would begin anew with every element
/// that is removed meanwhile.
///
/// # Errors
///
/// Kernel errors; `EINVAL` when the map is of another kind or its keys and values have other sizes.
pub fn read_all<K, V>(map: &MapData, visit: impl FnMut(K, V)) -> io::Result<()>
where
    K: aya::Pod + Default,
    V: aya::Pod + Default,
{
    read_first(map, usize::MAX, visit)
}

/// Reads the first elements of a map as [`read_all`] does, as many as asked for: those of an array are in their order.
///
/// # Errors
///
/// As of [`read_all`].
pub fn read_first<K, V>(map: &MapData, mut most: usize, mut visit: impl FnMut(K, V)) -> io::Result<()>
where
    K: aya::Pod + Default,
    V: aya::Pod + Default,
{
    const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
    /// More than a chain of a hash ever holds.
    const ROOM: usize = 4096;
    let info = map.info().map_err(io::Error::other)?;
    let kind = info.map_type().map_err(io::Error::other)?;
    if !matches!(kind, MapType::Hash | MapType::LruHash | MapType::Array) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    if [info.key_size() as usize, info.value_size() as usize] != [size_of::<K>(), size_of::<V>()] {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let map = number(map.fd().as_fd().as_raw_fd())?;
    let (mut keys, mut values) = (vec![K::default(); ROOM], vec![V::default(); ROOM]);
    let mut next = 0_u32;
    let place = (&raw mut next).expose_provenance() as u64;
    let mut batch = Batch { out_batch: place, map, ..Batch::default() };
    loop {
        batch.keys = keys.as_mut_ptr().expose_provenance() as u64;
        batch.values = values.as_mut_ptr().expose_provenance() as u64;
        batch.count = ROOM as u32;
        // SAFETY: `keys` and `values` have room for `count` elements of the sizes this map has, which may hold any bytes;
        // `next` for where to go on, which is a number in a hash and the key in an array. All of them live until the call
        // returns, and the map is borrowed.
        let result = unsafe { batch.call(BPF_MAP_LOOKUP_BATCH) };
        let over = match result {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            other => other.map(|()| false)?,
        };
        let count = most.min(batch.count as usize);
        keys.iter().zip(&values).take(count).for_each(|(key, value)| visit(*key, *value));
        most -= count;
        if over || most == 0 {
            return Ok(());
        }
        batch.in_batch = place;
    }
}

/// Has all threads share one heap from here on. glibc gives threads heaps of their own, and what one frees of another's
/// memory stays there: with 10,000 Services that was a third of what the agent held.
pub fn share_heap() {
    // SAFETY: takes two integers; other threads may allocate meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives memory back that was freed.
pub fn trim_heap() {
    // SAFETY: takes an integer, and touches free memory only.
    unsafe { libc::malloc_trim(0) };
}

/// Waits until every program that runs now has ended (`membarrier`, whose global form waits for an RCU grace period).
///
/// # Errors
///
/// `EINVAL` or `ENOSYS` on kernels that cannot do that.
pub fn wait_for_programs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of the network namespace of a socket (`SO_NETNS_COOKIE`, Linux 5.14).
///
/// # Errors
///
/// `ENOPROTOOPT` on older kernels.
pub fn namespace_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `cookie`, and the new length; both live
    // until the call returns.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Whether programs can be attached by links (`BPF_LINK_CREATE`, Linux 5.7): asked for a link of no program.
///
/// # Errors
///
/// `EPERM` when this process may not ask.
pub fn knows_links() -> io::Result<bool> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes { program: u32::MAX, target: u32::MAX, attach_type: 0, flags: 0 };
    // SAFETY: the command reads `attributes`, which lives until the call returns, up to the size given and no further.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw const attributes, size_of::<Attributes>())
    };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // A kernel that knows the command has looked for the program.
        _ if result >= 0 => Ok(true),
        Some(libc::EBADF) => Ok(true),
        Some(libc::EINVAL) => Ok(false),
        _ => Err(error),
    }
}

/// The programs attached to a cgroup itself at one hook, and how they were attached (`BPF_PROG_QUERY`, Linux 4.15).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// `BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI` or neither.
    pub flags: u32,
    /// The programs' ids.
    pub programs: Vec<u32>,
}

/// Asks which programs are attached to a cgroup at the hook `attach_type`.
///
/// # Errors
///
/// Kernel errors: `EINVAL` for a hook that this kernel lacks.
pub fn attached(cgroup: impl AsFd, attach_type: u32) -> io::Result<Attached> {
    const BPF_PROG_QUERY: libc::c_int = 16;
    /// The kernel lets no more be attached to one cgroup at one hook.
    const MOST: usize = 64;
    #[repr(C)]
    struct Attributes {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
    }
    let mut programs = vec![0_u32; MOST];
    let mut attributes = Attributes {
        target: number(cgroup.as_fd().as_raw_fd())?,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr().expose_provenance() as u64,
        count: MOST as u32,
        padding: 0,
    };
    // SAFETY: the command reads and writes `attributes` up to the size given, and writes at most `count` ids to `programs`,
    // which has room for them; both live until the call returns.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attributes, size_of::<Attributes>()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    programs.truncate(attributes.count as usize);
    Ok(Attached { flags: attributes.attach_flags, programs })
}

/// Attaches a program to a cgroup as one that suffers no other beside it (`BPF_PROG_ATTACH` without flags), which weir
/// itself never does: tests are such a program. It stays until the cgroup goes.
///
/// # Errors
///
/// Kernel errors: `EPERM` when other programs are attached.
pub fn attach_alone(cgroup: impl AsFd, program: impl AsFd, attach_type: u32) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    #[repr(C)]
    struct Attributes {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        target: number(cgroup.as_fd().as_raw_fd())?,
        program: number(program.as_fd().as_raw_fd())?,
        attach_type,
        flags: 0,
    };
    // SAFETY: the command reads `attributes`, which lives until the call returns, up to the size given and no further;
    // both descriptors are open for as long as their owners are borrowed.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attributes, size_of::<Attributes>())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
