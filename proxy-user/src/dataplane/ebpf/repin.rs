//! Pins maps again that attached programs use and that have lost their names.
//!
//! In: the programs behind the pinned links, and the names in the BPF file system. Out: a name again for each
//! map that has none. If an agent created another map under a missing name, it would write entries that the
//! attached programs do not read, and the programs would combine a record of one map with slots of another: a
//! socket would reach another Service.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    maps::{MapData, MapInfo},
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};

use super::{
    files::Files,
    generations::Generations,
    maps::is_missing,
    place::{HOOKS, Place},
    problem::Problem,
    sizes::{SERVICES, SOCKETS, Shape},
};

/// The kernel's ids of maps, by name.
pub(super) type Maps = BTreeMap<String, u32>;

/// Pins the maps of attached programs again where another program removed the pins. Returns the new pins.
///
/// # Errors
///
/// When names or programs cannot be read, or a map cannot be pinned.
pub fn repin(place: &Place) -> Result<Vec<PathBuf>, Problem> {
    if !place.sockets().exists() {
        return Ok(Vec::new());
    }
    repin_with(&mut Files::default(), place)
}

/// The same through `files`.
pub(super) fn repin_with(files: &mut Files, place: &Place) -> Result<Vec<PathBuf>, Problem> {
    let generations = Generations::of(place);
    let mut directories = vec![Directory::read(place.sockets(), &SOCKETS)?];
    for generation in generations.all()? {
        directories.push(Directory::read(generations.path(generation), &SERVICES)?);
    }
    let mut pinned = Vec::new();
    if directories.iter().all(Directory::is_complete) {
        return Ok(pinned);
    }
    // Links are read after names, because a removal of everything begins with the links.
    for program in used_by_programs(place)? {
        for (name, &id) in &program {
            if directories.iter().any(|directory| directory.maps.values().any(|known| *known == id)) {
                continue;
            }
            // The newest generation, if the map belongs to several.
            let Some(directory) =
                directories.iter_mut().rev().find(|directory| directory.lacks(name, &program))
            else {
                continue;
            };
            let path = directory.path.join(name);
            files.touch(&path);
            let map = MapData::from_id(id).map_err(|error| Problem::map(name, error))?;
            map.pin(&path).map_err(|error| Problem::file("pinning", &path, io::Error::other(error)))?;
            directory.maps.insert(name.clone(), id);
            pinned.push(path);
        }
    }
    Ok(pinned)
}

/// A directory of one group or generation.
struct Directory {
    path: PathBuf,
    /// The maps that belong there.
    shapes: &'static [Shape],
    /// The maps that are pinned there.
    maps: Maps,
}

impl Directory {
    fn read(path: PathBuf, shapes: &'static [Shape]) -> Result<Self, Problem> {
        Ok(Self { maps: pinned_in(&path)?, path, shapes })
    }

    fn is_complete(&self) -> bool {
        self.shapes.iter().all(|(name, ..)| self.maps.contains_key(*name))
    }

    /// Whether a map of this name belongs here and is missing, while every other map here is the program's.
    fn lacks(&self, name: &str, program: &Maps) -> bool {
        let belongs = self.shapes.iter().any(|(shape, ..)| *shape == name);
        let both = || self.maps.iter().filter_map(|(name, id)| Some((id, program.get(name)?)));
        belongs
            && !self.maps.contains_key(name)
            && both().next().is_some()
            && both().all(|(pinned, used)| pinned == used)
    }
}

pub(super) fn pinned_in(path: &Path) -> Result<Maps, Problem> {
    let failed = |path: &Path, error: io::Error| Problem::file("opening the map pinned at", path, error);
    let mut maps = Maps::new();
    for entry in fs::read_dir(path).map_err(|error| failed(path, error))? {
        let entry = entry.map_err(|error| failed(path, error))?;
        let pin = entry.path();
        match MapInfo::from_pin(&pin) {
            Ok(map) => maps.insert(entry.file_name().to_string_lossy().into_owned(), map.id()),
            Err(error) if is_missing(&error) => continue,
            Err(error) => return Err(failed(&pin, io::Error::other(error))),
        };
    }
    Ok(maps)
}

/// The maps that each program behind a pinned link uses.
pub(super) fn used_by_programs(place: &Place) -> Result<Vec<Maps>, Problem> {
    let mut programs = BTreeSet::new();
    for link in HOOKS.iter().map(|hook| place.link(hook)).filter(|link| link.exists()) {
        let id = PinnedLink::from_pin(&link).and_then(|link| Ok(FdLink::from(link).info()?.program_id()));
        programs.insert(id.map_err(|error| Problem::file("opening", &link, io::Error::other(error)))?);
    }
    if programs.is_empty() {
        return Ok(Vec::new());
    }
    let (mut used, mut names) = (Vec::new(), BTreeMap::new());
    // Another program may end while this reads them.
    for program in loaded_programs().filter_map(Result::ok).filter(|program| programs.contains(&program.id()))
    {
        let ids = program.map_ids().map_err(|error| Problem::program("of a pinned link", error))?;
        let mut maps = Maps::new();
        for id in ids.unwrap_or_default() {
            let name = match names.get(&id) {
                Some(name) => String::clone(name),
                None => {
                    let info = MapInfo::from_id(id).map_err(|error| Problem::map("of a program", error))?;
                    info.name_as_str().unwrap_or_default().to_owned()
                }
            };
            names.insert(id, name.clone());
            maps.insert(name, id);
        }
        used.push(maps);
    }
    Ok(used)
}
