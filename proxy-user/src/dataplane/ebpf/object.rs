//! The programs and maps in the kernel, and their names in the BPF file system.
//!
//! In: how large the maps have to be. Out: maps to write, and programs that read them, attached to a cgroup.
//!
//! ```text
//! <bpf-root>/v5/frontends, …   the maps of layout 5: whoever starts next finds them as they are
//! <bpf-root>/link-connect4, …  the links: programs stay attached while nobody runs
//! ```
//! To make a map larger is the same as to upgrade: new maps are filled, new programs that use them are loaded, and each
//! link is switched from the old program to the new one at one instant. Neither costs a connection.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapInfo},
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, ProgramFd, links::FdLink,
    },
};
use proxy_ebpf::{
    Affinity, AffinityKey, Crowd, Endpoint, Flows, FrontendKey, FrontendValue, LAYOUT_VERSION, Member,
    MemberKey, Origin, Record, Seat, Settings, Tally, system,
};
use tracing::debug;

use super::{
    PROGRAMS,
    links::Links,
    maps::{Maps, is_missing},
    problem::Problem,
    said::{self, Listener},
};

/// The maps that grow, and how many elements each has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) frontends: u32,
    pub(super) ports: u32,
    pub(super) records: u32,
    pub(super) slots: u32,
    pub(super) members: u32,
    pub(super) affinities: u32,
}

impl Sizes {
    /// What a node without Services starts with.
    pub(super) const LEAST: Self =
        Self { frontends: 1024, ports: 512, records: 2048, slots: 1024, members: 256, affinities: 64 };

    fn named(&self) -> [(&'static str, u32); 7] {
        [
            ("frontends", self.frontends),
            ("ports", self.ports),
            ("tallies", self.ports),
            ("records", self.records),
            ("slots", self.slots),
            ("members", self.members),
            ("affinities", self.affinities),
        ]
    }

    /// Room for `needed` and as much again where these sizes are too small; the same where they are not.
    pub(super) fn grown_to(&self, needed: &Self) -> Self {
        let grow = |have: u32, need: u32| {
            if need <= have {
                have
            } else {
                need.saturating_mul(2).checked_next_power_of_two().unwrap_or(u32::MAX)
            }
        };
        Self {
            frontends: grow(self.frontends, needed.frontends),
            ports: grow(self.ports, needed.ports),
            records: grow(self.records, needed.records),
            slots: grow(self.slots, needed.slots),
            members: grow(self.members, needed.members),
            affinities: grow(self.affinities, needed.affinities),
        }
    }
}

/// The maps that never grow.
const FIXED: [&str; 11] = [
    "settings", "troubles", "bypassed", "homes", "bound", "made", "origins", "seats", "flows", "crowds",
    "accounts",
];

/// Everything of ours in the kernel.
pub(super) struct Object {
    place: Place,
    ebpf: Ebpf,
    pub(super) maps: Maps,
    pub(super) sizes: Sizes,
    set_retval: bool,
    attached: bool,
    links: Links,
    /// Logs what the programs say, where somebody wants to know.
    listener: Option<Listener>,
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Place {
    /// A directory of ours in a BPF file system.
    pub bpf_root: PathBuf,
    /// The cgroup, of version 2, whose processes' sockets are served.
    pub cgroup_root: PathBuf,
}

impl Place {
    /// The directory of the maps of this layout.
    #[must_use]
    pub fn maps(&self) -> PathBuf {
        self.bpf_root.join(format!("v{LAYOUT_VERSION}"))
    }

    fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Where a larger map waits until it is in use.
    fn next_map(&self, name: &str) -> PathBuf {
        self.maps().join(format!("{name}-next"))
    }

    fn link(&self, program: &str) -> PathBuf {
        self.bpf_root.join(format!("link-{program}"))
    }

    /// Whether there are maps of this layout. Links that are missing are made anew.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.map("frontends").exists()
    }

    /// Takes the programs away, then the maps. Nothing there is fine.
    ///
    /// # Errors
    ///
    /// When something of ours cannot be removed.
    pub fn clear(&self) -> io::Result<()> {
        let mut found: Vec<PathBuf> = Vec::new();
        match fs::read_dir(&self.bpf_root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
            Ok(entries) => {
                for entry in entries {
                    found.push(entry?.path());
                }
            }
        }
        let links = found.iter().filter_map(|path| Some((leads(name_of(path).strip_prefix("link-")?), path)));
        let (leading, others): (Vec<_>, Vec<_>) = links.partition(|(leads, _)| *leads);
        leading.iter().chain(&others).try_for_each(|(_, path)| fs::remove_file(path))?;
        found.iter().filter(|path| is_layout(path)).try_for_each(remove_directory)?;
        match fs::remove_dir(&self.bpf_root) {
            // Somebody made it for us, or keeps something else there.
            Err(error) if error.kind() != io::ErrorKind::NotFound => debug!(%error, "the directory stays"),
            _ => {}
        }
        Ok(())
    }

    /// Removes the maps of other layouts, once nothing uses them.
    fn clear_other_layouts(&self) -> io::Result<()> {
        let ours = self.maps();
        for entry in fs::read_dir(&self.bpf_root)? {
            let path = entry?.path();
            if is_layout(&path) && path != ours {
                remove_directory(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether a program leads sockets to backends. Such are attached last and detached first, so that there is always one to
/// say what a socket asked for, and one to forget it.
fn leads(program: &str) -> bool {
    program.starts_with("connect") || program.starts_with("sendmsg")
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_layout(path: &Path) -> bool {
    name_of(path).strip_prefix('v').is_some_and(|version| version.parse::<u32>().is_ok())
}

fn remove_directory(path: &PathBuf) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(path)
}

impl Object {
    /// Loads the programs, with the maps that are there or with new ones. Nothing is attached yet.
    pub(super) fn open(place: Place, set_retval: bool) -> Result<Self, Problem> {
        fs::create_dir_all(place.maps())
            .map_err(|error| Problem::file("making the directory", &place.maps(), error))?;
        let mut sizes = Sizes::LEAST;
        for (name, size) in [
            ("frontends", &mut sizes.frontends),
            ("ports", &mut sizes.ports),
            ("records", &mut sizes.records),
            ("slots", &mut sizes.slots),
            ("members", &mut sizes.members),
            ("affinities", &mut sizes.affinities),
        ] {
            discard(&place.next_map(name))?;
            if let Some(found) = room(&place.map(name))? {
                *size = found;
            }
        }
        check_layout(&place)?;
        let (ebpf, maps, listener) = load(&place, &sizes, set_retval, &[])?;
        Ok(Self { place, ebpf, maps, sizes, set_retval, attached: false, links: Links::default(), listener })
    }

    /// The links, for what keeps them up.
    pub(super) fn links(&self) -> Links {
        self.links.clone()
    }

    /// Where it all is.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Makes maps larger, keeping what they hold.
    pub(super) fn grow(&mut self, sizes: Sizes, slots_in_use: u32) -> Result<(), Problem> {
        let larger: Vec<&'static str> = self
            .sizes
            .named()
            .iter()
            .zip(sizes.named())
            .filter(|((_, have), (_, want))| want > have)
            .map(|((name, _), _)| *name)
            .collect();
        if larger.is_empty() {
            return Ok(());
        }
        for name in &larger {
            discard(&self.place.next_map(name))?;
        }
        let (ebpf, maps, listener) = load(&self.place, &sizes, self.set_retval, &larger)?;
        let mut old = std::mem::replace(&mut self.maps, maps);
        self.maps.inherit(&mut old);
        let old_ebpf = std::mem::replace(&mut self.ebpf, ebpf);
        let filled = larger.iter().try_for_each(|name| self.maps.copy(name, &old, slots_in_use));
        let switched = filled.and_then(|()| if self.attached { self.attach() } else { Ok(()) });
        if let Err(problem) = switched {
            old.inherit(&mut self.maps);
            (self.maps, self.ebpf) = (old, old_ebpf);
            if self.attached {
                self.attach()?;
            }
            return Err(problem);
        }
        if larger.contains(&"affinities") {
            // Clients that came while the programs were switched.
            self.maps.add_affinities(&old)?;
        }
        for name in &larger {
            let (from, to) = (self.place.next_map(name), self.place.map(name));
            fs::rename(&from, &to).map_err(|error| Problem::file("renaming", &from, error))?;
        }
        tracing::info!(?sizes, "made maps larger: {}", larger.join(", "));
        (self.sizes, self.listener) = (sizes, listener);
        Ok(())
    }

    /// Whether the programs are attached by us.
    pub(super) fn is_attached(&self) -> bool {
        self.attached
    }

    /// Attaches every program, in the place of the one that is attached already where there is one.
    pub(super) fn attach(&mut self) -> Result<(), Problem> {
        let links = self.links.clone();
        let mut attached = links.while_attaching();
        let root = &self.place.cgroup_root;
        let cgroup = File::open(root).map_err(|error| Problem::file("opening the cgroup", root, error))?;
        let number =
            cgroup.metadata().map_err(|error| Problem::file("opening the cgroup", root, error))?.ino();
        let mut settings = self.settings()?;
        let moved = settings.cgroup != number;
        let mut programs: Vec<_> = self.ebpf.programs_mut().collect();
        programs.sort_by_key(|(name, _)| (leads(name), *name));
        for (name, program) in &mut programs {
            let link = self.place.link(name);
            if !moved && switch(&link, program.fd().map_err(|error| Problem::program(name, error))?)? {
                continue;
            }
            let fresh = attach(program, &cgroup).map_err(|error| Problem::program(name, error))?;
            discard(&link)?;
            fresh.pin(&link).map_err(|error| Problem::file("pinning", &link, io::Error::other(error)))?;
        }
        let pinned = programs.iter().map(|(name, program)| {
            let program = program.fd().map_err(|error| Problem::program(name, error))?;
            let program = program.as_fd().try_clone_to_owned();
            let link = self.place.link(name);
            Ok((
                link.clone(),
                program.map_err(|error| Problem::file("keeping the program of", &link, error))?,
            ))
        });
        let pinned = pinned.collect::<Result<Vec<_>, Problem>>()?;
        attached
            .are(root, pinned)
            .map_err(|error| Problem::file("looking at the links in", &self.place.bpf_root, error))?;
        settings.cgroup = number;
        settings.layout = LAYOUT_VERSION;
        self.maps.set_settings(settings)?;
        self.attached = true;
        self.place.clear_other_layouts().map_err(|error| {
            Problem::file("removing maps of another layout from", &self.place.bpf_root, error)
        })
    }

    /// Detaches the programs that lead sockets to backends. Those that translate back and forget stay for the sockets that
    /// were led, and so do the maps.
    pub(super) fn step_aside(&mut self) -> Result<(), Problem> {
        self.attached = false;
        let links = self.links.clone();
        let mut attached = links.while_attaching();
        // They are not to be brought back.
        attached.clear();
        self.ebpf
            .programs()
            .filter(|(name, _)| leads(name))
            .try_for_each(|(name, _)| discard(&self.place.link(name)))
    }

    pub(super) fn settings(&self) -> Result<Settings, Problem> {
        self.maps.settings()
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> Result<(), Problem> {
        self.maps.set_settings(settings)
    }

    /// Takes programs and maps away.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.attached = false;
        self.links.while_attaching().clear();
        self.place.clear()
    }
}

/// Loads the object with its pinned maps; those named in `next` are made anew, pinned beside the old ones.
fn load(
    place: &Place,
    sizes: &Sizes,
    set_retval: bool,
    next: &[&'static str],
) -> Result<(Ebpf, Maps, Option<Listener>), Problem> {
    let set_retval = u32::from(set_retval);
    let clients = sizes.affinities;
    let mut loader = EbpfLoader::new();
    // The programs look into no structures of the kernel's own, so its types, megabytes of them, need not be read.
    loader.btf(None).override_global("SET_RETVAL", &set_retval, true);
    loader.override_global("CLIENTS_ROOM", &clients, true);
    let level = if said::is_wanted() { aya_log::Level::Trace as u8 } else { 0 };
    loader.override_global(said::LEVEL, &level, true);
    for (name, size) in sizes.named() {
        let path = if next.contains(&name) { place.next_map(name) } else { place.map(name) };
        loader.map_pin_path(name, path).map_max_entries(name, size);
    }
    for name in FIXED {
        loader.map_pin_path(name, place.map(name));
    }
    let mut ebpf = loader.load(PROGRAMS).map_err(|error| Problem::Load(Box::new(error)))?;
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            _ => continue,
        };
        loaded.map_err(|error| Problem::program(name, error))?;
    }
    let listener = if level == 0 { None } else { Some(Listener::to(&mut ebpf)?) };
    let maps = Maps::of(&mut ebpf)?;
    Ok((ebpf, maps, listener))
}

/// How many elements the map pinned at a path has room for, if there is one.
fn room(path: &Path) -> Result<Option<u32>, Problem> {
    Ok(pinned(path)?.map(|info| info.max_entries()))
}

fn pinned(path: &Path) -> Result<Option<MapInfo>, Problem> {
    let failed = |error| Problem::file("opening the map pinned at", path, io::Error::other(error));
    match MapData::from_pin(path) {
        Ok(map) => map.info().map(Some).map_err(failed),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Refuses maps that are not as this layout has them: somebody else's, or those of a version that forgot to say that its
/// layout is another.
fn check_layout(place: &Place) -> Result<(), Problem> {
    for (name, key, value) in SHAPES {
        let path = place.map(name);
        let Some(info) = pinned(&path)? else { continue };
        let found = [info.key_size(), info.value_size()];
        let expected = [key, value].map(|size| u32::try_from(size).unwrap_or(u32::MAX));
        if found != expected {
            return Err(Problem::Layout { path, found, expected });
        }
    }
    Ok(())
}

/// Bytes of every map's keys and values.
const SHAPES: [(&str, usize, usize); 18] = [
    ("frontends", size_of::<FrontendKey>(), size_of::<FrontendValue>()),
    ("ports", size_of::<u32>(), size_of::<u64>()),
    ("records", size_of::<u32>(), size_of::<Record>()),
    ("slots", size_of::<u32>(), size_of::<Endpoint>()),
    ("members", size_of::<MemberKey>(), size_of::<Member>()),
    ("affinities", size_of::<AffinityKey>(), size_of::<Affinity>()),
    ("tallies", size_of::<u32>(), size_of::<Tally>()),
    ("settings", size_of::<u32>(), size_of::<Settings>()),
    ("troubles", size_of::<u32>(), size_of::<u64>()),
    ("bypassed", size_of::<u64>(), size_of::<u32>()),
    ("homes", size_of::<u32>(), size_of::<u64>()),
    ("bound", size_of::<u32>(), size_of::<u64>()),
    ("made", size_of::<u32>(), size_of::<u64>()),
    ("origins", size_of::<u64>(), size_of::<Origin>()),
    ("seats", size_of::<u32>(), size_of::<Seat>()),
    ("flows", size_of::<u32>(), size_of::<Flows>()),
    ("crowds", size_of::<u32>(), size_of::<Crowd>()),
    ("accounts", size_of::<u32>(), size_of::<u64>()),
];

/// The names of all maps.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|(name, ..)| *name)
}

/// Removes a pin that may not be there.
fn discard(path: &Path) -> Result<(), Problem> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Problem::file("removing", path, error)),
        _ => Ok(()),
    }
}

/// Puts a program in the place of another behind a pinned link. False when there is no such link, or when its cgroup is
/// gone and the link leads nowhere.
fn switch(link: &Path, program: &ProgramFd) -> Result<bool, Problem> {
    let fail = |error| Problem::file("switching the program behind", link, error);
    let pinned = match system::open_pinned(link) {
        Ok(pinned) => pinned,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(fail(error)),
    };
    match system::update_link(&pinned, program) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(fail(error)),
    }
}

/// Attaches a program beside those that are attached already. Of links there may be several whatever is asked for, and
/// creating one refuses the flag that would ask for it.
fn attach(program: &mut Program, cgroup: &File) -> Result<FdLink, ProgramError> {
    Ok(match program {
        Program::CgroupSockAddr(program) => {
            let link = CgroupSockAddr::attach(program, cgroup, CgroupAttachMode::Single)?;
            program.take_link(link)?.try_into().map_err(|_| ProgramError::NotAttached)?
        }
        Program::CgroupSock(program) => {
            let link = CgroupSock::attach(program, cgroup, CgroupAttachMode::Single)?;
            program.take_link(link)?.try_into().map_err(|_| ProgramError::NotAttached)?
        }
        _ => return Err(ProgramError::UnexpectedProgramType),
    })
}
