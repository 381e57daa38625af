//! Loads, pins and attaches the programs and their maps.
//!
//! In: the sizes of the maps. Out: maps to write, and programs that read them, attached to a cgroup.
//!
//! Maps grow in the same way as an upgrade replaces them: the agent fills a new generation of the maps, loads
//! new programs that use it, and switches each link from the old program to the new one atomically. Neither
//! costs a connection.

use std::{
    fs::File,
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use crate::sys::bpf;
use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, MapInfo},
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, ProgramFd, links::FdLink,
    },
};
use proxy_ebpf::{SERVICES_VERSION, Settings};

use super::{
    PROGRAMS,
    files::Files,
    generations::Generations,
    links::Links,
    maps::{Maps, is_missing},
    place::{HOOKS, Place, translates_to_backends},
    problem::Problem,
    repin::repin_with,
    sizes::{SERVICES, SOCKETS, Shape, Sizes},
    trace_log::{self, Listener},
};

/// weir's programs, maps and links in the kernel.
pub(super) struct Loader {
    place: Place,
    files: Files,
    ebpf: Ebpf,
    pub(super) maps: Maps,
    pub(super) sizes: Sizes,
    /// The generation of the maps of Services.
    generation: u32,
    /// Whether attached programs use this generation.
    serves: bool,
    set_retval: bool,
    attached: bool,
    links: Links,
    /// Logs trace messages, if the log level includes them.
    listener: Option<Listener>,
}

impl Loader {
    /// Loads the programs, with the pinned maps or with new ones, and attaches nothing. If an earlier agent
    /// was killed while it switched programs, this completes the switch: all attached programs use the same
    /// maps as these.
    pub(super) fn open(place: Place, set_retval: bool, mut files: Files) -> Result<Self, Problem> {
        place.make(&mut files)?;
        let generations = Generations::of(&place);
        let repinned = repin_with(&mut files, &place)?;
        if !repinned.is_empty() {
            tracing::warn!(maps = ?repinned, "another program removed pins of weir's maps; weir pinned them again");
        }
        let serving = generations.serving(&place)?;
        let current = generations.current();
        let generation = match serving.generation {
            Some(generation) => generation,
            None => generations.all()?.last().map_or(1, |last| last + 1),
        };
        let directory = generations.path(generation);
        files.make_directory(&directory)?;
        let sizes = Sizes::found(|name| {
            Ok::<_, Problem>(pinned(&directory.join(name))?.map(|map| map.max_entries()))
        })?;
        let pins = Pins::find(&place, &directory)?;
        let mut loaded = load(&pins, &sizes, set_retval)?;
        pin(&mut files, &loaded, &place, &directory)?;
        let maps = Maps::of(&mut loaded.ebpf)?;
        let Loaded { ebpf, listener } = loaded;
        let mut loader = Self {
            place,
            files,
            ebpf,
            maps,
            sizes,
            generation,
            serves: serving.attached,
            set_retval,
            attached: false,
            links: Links::default(),
            listener,
        };
        if serving.mixed {
            loader.switch_links()?;
        }
        if current != Some(generation) {
            generations.publish(&mut loader.files, generation)?;
        }
        generations.keep(&mut loader.files, generation)?;
        Ok(loader)
    }

    /// The links, for the thread that repairs them.
    pub(super) fn links(&self) -> Links {
        self.links.clone()
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Makes maps larger and keeps their entries.
    pub(super) fn grow(&mut self, sizes: Sizes, slots_in_use: u32) -> Result<(), Problem> {
        let both = self.sizes.named().into_iter().zip(sizes.named());
        let larger: Vec<&'static str> =
            both.filter(|((_, have), (_, want))| want > have).map(|((name, _), _)| name).collect();
        if larger.is_empty() {
            return Ok(());
        }
        let generations = Generations::of(&self.place);
        let next = generations.all()?.last().map_or(1, |last| last + 1);
        if let Err(problem) = self.grow_into(next, &sizes, &larger, slots_in_use) {
            if let Err(error) = generations.keep(&mut self.files, self.generation) {
                tracing::warn!(%error, "cannot remove unused maps, which take memory");
            }
            return Err(problem);
        }
        generations.publish(&mut self.files, next)?;
        generations.keep(&mut self.files, next)?;
        tracing::info!(maps = larger.join(", "), "made maps larger for more Services");
        Ok(())
    }

    /// Fills a generation and switches the attached programs to it. After an error the programs use the old
    /// generation.
    fn grow_into(
        &mut self,
        next: u32,
        sizes: &Sizes,
        larger: &[&'static str],
        slots_in_use: u32,
    ) -> Result<(), Problem> {
        let generations = Generations::of(&self.place);
        let mut pins = Pins::find(&self.place, &generations.path(self.generation))?;
        pins.0.retain(|(name, _)| !larger.contains(name));
        let mut loaded = load(&pins, sizes, self.set_retval)?;
        let directory = generations.path(next);
        self.files.make_directory(&directory)?;
        pin(&mut self.files, &loaded, &self.place, &directory)?;
        let maps = Maps::of(&mut loaded.ebpf)?;
        let mut old = std::mem::replace(&mut self.maps, maps);
        self.maps.inherit(&mut old);
        let old_ebpf = std::mem::replace(&mut self.ebpf, loaded.ebpf);
        let filled = larger.iter().try_for_each(|name| self.maps.copy(name, &old, slots_in_use));
        let switched = filled.and_then(|()| self.take_over());
        if let Err(problem) = switched {
            old.inherit(&mut self.maps);
            (self.maps, self.ebpf) = (old, old_ebpf);
            self.take_over()?;
            return Err(problem);
        }
        if larger.contains(&"affinities") {
            // Clients that the old programs stored during the switch.
            self.maps.add_affinities(&old)?;
        }
        (self.sizes, self.generation, self.listener) = (*sizes, next, loaded.listener);
        Ok(())
    }

    /// Whether this agent has attached the programs.
    pub(super) fn is_attached(&self) -> bool {
        self.attached
    }

    /// Attaches these programs in the place of attached ones: all programs if this agent has attached them
    /// before, and otherwise those that have a link.
    fn take_over(&mut self) -> Result<(), Problem> {
        match (self.attached, self.serves) {
            (true, _) => self.attach(),
            (false, true) => self.switch_links(),
            (false, false) => Ok(()),
        }
    }

    /// Switches every existing link to these programs.
    fn switch_links(&mut self) -> Result<(), Problem> {
        let mut programs: Vec<_> = self.ebpf.programs().collect();
        programs.sort_by_key(|(name, _)| (translates_to_backends(name), *name));
        for (name, program) in programs {
            let link = self.place.link(name);
            self.files.touch(&link);
            switch(&link, program.fd().map_err(|error| Problem::program(name, error))?)?;
        }
        Ok(())
    }

    /// Attaches every program. An existing link is switched to it.
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
        programs.sort_by_key(|(name, _)| (translates_to_backends(name), *name));
        for (name, program) in &mut programs {
            let link = self.place.link(name);
            self.files.touch(&link);
            if !moved && switch(&link, program.fd().map_err(|error| Problem::program(name, error))?)? {
                continue;
            }
            let fresh = attach(program, &cgroup).map_err(|error| Problem::program(name, error))?;
            self.files.discard(&link)?;
            self.files.touch(&link);
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
            .set(root, pinned)
            .map_err(|error| Problem::file("reading the links in", &self.place.bpf_root, error))?;
        settings.cgroup = number;
        settings.layout = SERVICES_VERSION;
        self.maps.set_settings(settings)?;
        (self.attached, self.serves) = (true, true);
        self.place.clear_other_layouts(&mut self.files).map_err(|error| {
            Problem::file("removing maps of another layout from", &self.place.bpf_root, error)
        })
    }

    /// Detaches the programs that translate to backends. The others stay for sockets that were translated,
    /// and so do the maps.
    pub(super) fn step_aside(&mut self) -> Result<(), Problem> {
        self.attached = false;
        let links = self.links.clone();
        let mut attached = links.while_attaching();
        // The thread must not attach them again.
        attached.clear();
        let translating =
            HOOKS.iter().filter(|hook| translates_to_backends(hook)).map(|hook| self.place.link(hook));
        translating.collect::<Vec<_>>().iter().try_for_each(|link| self.files.discard(link))
    }

    pub(super) fn settings(&self) -> Result<Settings, Problem> {
        self.maps.settings()
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> Result<(), Problem> {
        self.maps.set_settings(settings)
    }

    pub(super) fn clear(&mut self) -> io::Result<()> {
        (self.attached, self.serves) = (false, false);
        self.links.while_attaching().clear();
        self.place.clear()
    }
}

/// The pinned maps, by name.
struct Pins(Vec<(&'static str, PathBuf)>);

impl Pins {
    /// Finds the maps of Services in a directory, and the maps of sockets. Refuses maps with another layout:
    /// another program's, or those of a version whose layout changed without a new version number.
    fn find(place: &Place, services: &Path) -> Result<Self, Problem> {
        let mut pins = Vec::new();
        for (name, key, value, path) in paths(place, services) {
            let Some(info) = pinned(&path)? else { continue };
            let found = [info.key_size(), info.value_size()];
            let expected = [key, value].map(|size| u32::try_from(size).unwrap_or(u32::MAX));
            if found != expected {
                return Err(Problem::Layout { path, found, expected });
            }
            pins.push((name, path));
        }
        Ok(Self(pins))
    }
}

/// Every map, with the sizes of its keys and values and the path of its pin.
fn paths(place: &Place, services: &Path) -> impl Iterator<Item = (&'static str, usize, usize, PathBuf)> {
    let at = |shapes: &'static [Shape], directory: PathBuf| {
        shapes.iter().map(move |(name, key, value)| (*name, *key, *value, directory.join(name)))
    };
    at(&SERVICES, services.to_owned()).chain(at(&SOCKETS, place.sockets()))
}

/// The loaded programs, with their maps.
struct Loaded {
    ebpf: Ebpf,
    listener: Option<Listener>,
}

/// Loads the programs with these pinned maps; all others are created.
fn load(pins: &Pins, sizes: &Sizes, set_retval: bool) -> Result<Loaded, Problem> {
    let set_retval = u32::from(set_retval);
    let clients = sizes.affinities;
    let mut loader = EbpfLoader::new();
    // The programs access no structures of the kernel, so its types, which are megabytes, need not be read.
    loader.btf(None).override_global("SET_RETVAL", &set_retval, true);
    loader.override_global("CLIENTS_ROOM", &clients, true);
    let level = if trace_log::is_enabled() { aya_log::Level::Trace as u8 } else { 0 };
    loader.override_global(trace_log::LEVEL, &level, true);
    for (name, size) in sizes.named() {
        loader.map_max_entries(name, size);
    }
    for (name, path) in &pins.0 {
        loader.map_pin_path(name, path.as_path());
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
    Ok(Loaded { ebpf, listener })
}

/// Pins those maps of loaded programs that have no pin.
fn pin(files: &mut Files, loaded: &Loaded, place: &Place, services: &Path) -> Result<(), Problem> {
    for (name, _, _, path) in paths(place, services).filter(|(.., path)| !path.exists()) {
        files.pin(loaded.ebpf.map(name).ok_or(Problem::MissingMap(name))?, &path)?;
    }
    Ok(())
}

fn pinned(path: &Path) -> Result<Option<MapInfo>, Problem> {
    let failed = |error| Problem::file("opening the map pinned at", path, io::Error::other(error));
    match MapData::from_pin(path) {
        Ok(map) => map.info().map(Some).map_err(failed),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Switches a pinned link to another program. False if there is no such link, or if its cgroup is gone.
fn switch(link: &Path, program: &ProgramFd) -> Result<bool, Problem> {
    let fail = |error| Problem::file("switching the program behind", link, error);
    let pinned = match bpf::open_pinned(link) {
        Ok(pinned) => pinned,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(fail(error)),
    };
    match bpf::update_link(&pinned, program) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(fail(error)),
    }
}

/// Attaches a program beside those that are attached already. `Single` means no flags: several links are
/// always allowed, and the kernel refuses `BPF_F_ALLOW_MULTI` for links.
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
