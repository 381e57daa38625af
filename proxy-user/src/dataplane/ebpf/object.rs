//! The programs and maps in the kernel, and their names in the BPF file system.
//!
//! In: how large the maps have to be. Out: maps to write, and programs that read them, attached to a cgroup.
//!
//! To make a map larger is the same as to upgrade: a new generation of the maps is filled, new programs that use it are
//! loaded, and each link is switched from the old program to the new one at one instant. Neither costs a connection.

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
    named::name_with,
    place::{HOOKS, Place, leads},
    problem::Problem,
    said::{self, Listener},
    sizes::{SERVICES, SOCKETS, Shape, Sizes},
};

/// Everything of ours in the kernel.
pub(super) struct Object {
    place: Place,
    files: Files,
    ebpf: Ebpf,
    pub(super) maps: Maps,
    pub(super) sizes: Sizes,
    /// Which generation of the maps of Services this is.
    generation: u32,
    /// Whether programs that are attached use it.
    serves: bool,
    set_retval: bool,
    attached: bool,
    links: Links,
    /// Logs what the programs say, where the log level asks for it.
    listener: Option<Listener>,
}

impl Object {
    /// Loads the programs, with the maps that are there or with new ones. Nothing is attached yet, but what an agent began
    /// that was killed is brought to an end: all programs that are attached use the same maps as these.
    pub(super) fn open(place: Place, set_retval: bool, mut files: Files) -> Result<Self, Problem> {
        place.make(&mut files)?;
        let generations = Generations::of(&place);
        let named = name_with(&mut files, &place)?;
        if !named.is_empty() {
            tracing::warn!(maps = ?named, "another program removed the names of our maps; they have them again");
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
        let mut object = Self {
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
            object.switch_links()?;
        }
        if current != Some(generation) {
            generations.publish(&mut object.files, generation)?;
        }
        generations.keep(&mut object.files, generation)?;
        Ok(object)
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
                tracing::warn!(%error, "maps that are not used stay in memory");
            }
            return Err(problem);
        }
        generations.publish(&mut self.files, next)?;
        generations.keep(&mut self.files, next)?;
        tracing::info!(maps = larger.join(", "), "made maps larger, because more Services need room");
        Ok(())
    }

    /// Fills a generation and has the attached programs use it; after an error they use the one that there was.
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
            // Clients that came while the programs were switched.
            self.maps.add_affinities(&old)?;
        }
        (self.sizes, self.generation, self.listener) = (*sizes, next, loaded.listener);
        Ok(())
    }

    /// Whether the programs are attached by us.
    pub(super) fn is_attached(&self) -> bool {
        self.attached
    }

    /// Has the sockets meet these programs, if they meet some: all of them where we have attached them, and otherwise those
    /// that have a link.
    fn take_over(&mut self) -> Result<(), Problem> {
        match (self.attached, self.serves) {
            (true, _) => self.attach(),
            (false, true) => self.switch_links(),
            (false, false) => Ok(()),
        }
    }

    /// Puts these programs in the place of those that are attached, wherever there is a link.
    fn switch_links(&mut self) -> Result<(), Problem> {
        let mut programs: Vec<_> = self.ebpf.programs().collect();
        programs.sort_by_key(|(name, _)| (leads(name), *name));
        for (name, program) in programs {
            let link = self.place.link(name);
            self.files.touch(&link);
            switch(&link, program.fd().map_err(|error| Problem::program(name, error))?)?;
        }
        Ok(())
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
            .are(root, pinned)
            .map_err(|error| Problem::file("looking at the links in", &self.place.bpf_root, error))?;
        settings.cgroup = number;
        settings.layout = SERVICES_VERSION;
        self.maps.set_settings(settings)?;
        (self.attached, self.serves) = (true, true);
        self.place.clear_other_layouts(&mut self.files).map_err(|error| {
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
        let leading = HOOKS.iter().filter(|hook| leads(hook)).map(|hook| self.place.link(hook));
        leading.collect::<Vec<_>>().iter().try_for_each(|link| self.files.discard(link))
    }

    pub(super) fn settings(&self) -> Result<Settings, Problem> {
        self.maps.settings()
    }

    pub(super) fn set_settings(&mut self, settings: Settings) -> Result<(), Problem> {
        self.maps.set_settings(settings)
    }

    /// Takes programs and maps away.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        (self.attached, self.serves) = (false, false);
        self.links.while_attaching().clear();
        self.place.clear()
    }
}

/// The maps that are there, by name.
struct Pins(Vec<(&'static str, PathBuf)>);

impl Pins {
    /// Finds the maps of Services in a directory, and those of sockets. Refuses maps that are not as this layout has them:
    /// another program's, or those of a version that forgot to say that its layout is another.
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

/// Every map, with the bytes of its keys and values and where it is pinned.
fn paths(place: &Place, services: &Path) -> impl Iterator<Item = (&'static str, usize, usize, PathBuf)> {
    let at = |shapes: &'static [Shape], directory: PathBuf| {
        shapes.iter().map(move |(name, key, value)| (*name, *key, *value, directory.join(name)))
    };
    at(&SERVICES, services.to_owned()).chain(at(&SOCKETS, place.sockets()))
}

/// The programs, with maps.
struct Loaded {
    ebpf: Ebpf,
    listener: Option<Listener>,
}

/// Loads the object with these pinned maps; all others are made anew.
fn load(pins: &Pins, sizes: &Sizes, set_retval: bool) -> Result<Loaded, Problem> {
    let set_retval = u32::from(set_retval);
    let clients = sizes.affinities;
    let mut loader = EbpfLoader::new();
    // The programs look into no structures of the kernel's own, so its types, megabytes of them, need not be read.
    loader.btf(None).override_global("SET_RETVAL", &set_retval, true);
    loader.override_global("CLIENTS_ROOM", &clients, true);
    let level = if said::is_wanted() { aya_log::Level::Trace as u8 } else { 0 };
    loader.override_global(said::LEVEL, &level, true);
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

/// Pins the maps of loaded programs that are not pinned where they should be.
fn pin(files: &mut Files, loaded: &Loaded, place: &Place, services: &Path) -> Result<(), Problem> {
    for (name, _, _, path) in paths(place, services).filter(|(.., path)| !path.exists()) {
        files.pin(loaded.ebpf.map(name).ok_or(Problem::Object(name))?, &path)?;
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

/// Puts a program in the place of another behind a pinned link. False when there is no such link, or when its cgroup is
/// gone and the link leads nowhere.
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
