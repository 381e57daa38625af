//! The generations of the maps of Services, and which of them serves.
//!
//! In: a directory, and what the attached programs use. Out: the generation to go on with.
//!
//! Maps grow by a new generation: a directory of its own, in which those that stay are pinned too. It serves when programs
//! that use it are attached, and `current` leads to it from then on. An agent that is killed on the way leaves programs of
//! both, or a name that leads to the wrong one, so whoever starts next goes by what programs use: their links are switched
//! when the generation is filled, not before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapData,
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};

use super::{
    files::Files,
    place::{HOOKS, Place, numbered},
    problem::Problem,
};

/// The directory of all generations.
pub(super) struct Generations(PathBuf);

/// Which generation serves.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Serving {
    /// The newest that an attached program uses.
    pub(super) generation: Option<u32>,
    /// Whether another attached program uses an older one.
    pub(super) mixed: bool,
}

impl Generations {
    pub(super) fn of(place: &Place) -> Self {
        Self(place.generations())
    }

    pub(super) fn path(&self, generation: u32) -> PathBuf {
        self.0.join(format!("g{generation}"))
    }

    /// Those that are there.
    pub(super) fn all(&self) -> Result<BTreeSet<u32>, Problem> {
        let read = || -> io::Result<BTreeSet<u32>> {
            let mut all = BTreeSet::new();
            for entry in fs::read_dir(&self.0)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    all.extend(entry.file_name().to_str().and_then(|name| numbered(name, "g")));
                }
            }
            Ok(all)
        };
        read().map_err(|error| Problem::file("reading the directory", &self.0, error))
    }

    /// The one that `current` leads to, if that is there.
    pub(super) fn current(&self) -> Option<u32> {
        let target = fs::read_link(self.0.join("current")).ok()?;
        let generation = numbered(target.to_str()?, "g")?;
        self.path(generation).is_dir().then_some(generation)
    }

    /// Has `current` lead to a generation.
    pub(super) fn publish(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        files.lead(&self.0.join("current"), &format!("g{generation}"))
    }

    /// Removes all but one.
    pub(super) fn keep(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        for other in self.all()?.into_iter().filter(|other| *other != generation) {
            self.remove(files, other)?;
        }
        Ok(())
    }

    /// Removes one.
    pub(super) fn remove(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        let path = self.path(generation);
        files.remove_directory(&path).map_err(|error| Problem::file("removing", &path, error))
    }

    /// Which generation the attached programs use.
    pub(super) fn serving(&self, place: &Place) -> Result<Serving, Problem> {
        let mut generations = BTreeMap::new();
        for generation in self.all()? {
            generations.insert(generation, maps_in(&self.path(generation))?);
        }
        Ok(Serving::of(&generations, &used_by_programs(place)?))
    }
}

impl Serving {
    /// `generations` are the maps of each, and `programs` those that each program uses. Maps that did not grow belong to
    /// several generations.
    fn of(generations: &BTreeMap<u32, BTreeSet<u32>>, programs: &[BTreeSet<u32>]) -> Self {
        let known: BTreeSet<u32> = generations.values().flatten().copied().collect();
        let fits = |program: &BTreeSet<u32>| -> Vec<u32> {
            let used: BTreeSet<u32> = program.intersection(&known).copied().collect();
            let fitting = generations.iter().filter(|(_, maps)| !used.is_empty() && used.is_subset(maps));
            fitting.map(|(generation, _)| *generation).collect()
        };
        let fitting: Vec<Vec<u32>> =
            programs.iter().map(fits).filter(|fitting| !fitting.is_empty()).collect();
        let generation = fitting.iter().filter_map(|fitting| fitting.first()).max().copied();
        let mixed = generation.is_some_and(|newest| fitting.iter().any(|fitting| !fitting.contains(&newest)));
        Self { generation, mixed }
    }
}

/// The numbers of the maps that are pinned in a directory.
fn maps_in(path: &Path) -> Result<BTreeSet<u32>, Problem> {
    let failed = |path: &Path, error: io::Error| Problem::file("opening the map pinned at", path, error);
    let mut maps = BTreeSet::new();
    for entry in fs::read_dir(path).map_err(|error| failed(path, error))? {
        let pin = entry.map_err(|error| failed(path, error))?.path();
        let id = MapData::from_pin(&pin).and_then(|map| Ok(map.info()?.id()));
        maps.insert(id.map_err(|error| failed(&pin, io::Error::other(error)))?);
    }
    Ok(maps)
}

/// The maps that each program behind a pinned link uses.
fn used_by_programs(place: &Place) -> Result<Vec<BTreeSet<u32>>, Problem> {
    let mut programs = BTreeSet::new();
    for link in HOOKS.iter().map(|hook| place.link(hook)).filter(|link| link.exists()) {
        let id = PinnedLink::from_pin(&link).and_then(|link| Ok(FdLink::from(link).info()?.program_id()));
        programs.insert(id.map_err(|error| Problem::file("opening", &link, io::Error::other(error)))?);
    }
    if programs.is_empty() {
        return Ok(Vec::new());
    }
    let mut used = Vec::new();
    // A program of somebody else's may go while they are read.
    for program in loaded_programs().filter_map(Result::ok).filter(|program| programs.contains(&program.id()))
    {
        let maps = program.map_ids().map_err(|error| Problem::program("of a pinned link", error))?;
        used.push(maps.unwrap_or_default().into_iter().collect());
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Generation 1 with maps 1 and 2, generation 2 with 3 in the place of 1.
    fn serving(programs: &[&[u32]]) -> (Option<u32>, bool) {
        let set = |maps: &[u32]| maps.iter().copied().collect::<BTreeSet<u32>>();
        let generations = BTreeMap::from([(1, set(&[1, 2])), (2, set(&[2, 3]))]);
        let programs: Vec<BTreeSet<u32>> = programs.iter().map(|maps| set(maps)).collect();
        let Serving { generation, mixed } = Serving::of(&generations, &programs);
        (generation, mixed)
    }

    #[test]
    fn what_programs_use_says_which_generation_serves() {
        assert_eq!(serving(&[]), (None, false), "nothing is attached");
        assert_eq!(serving(&[&[9], &[]]), (None, false), "programs of another layout");
        assert_eq!(serving(&[&[1, 2, 9], &[9]]), (Some(1), false), "no link was switched yet");
        assert_eq!(serving(&[&[1, 2], &[2, 3]]), (Some(2), true), "some were");
        assert_eq!(serving(&[&[2, 3], &[2], &[9]]), (Some(2), false), "all were");
    }

    #[test]
    fn a_map_that_did_not_grow_does_not_tell() {
        assert_eq!(serving(&[&[1], &[2]]), (Some(1), false));
        assert_eq!(serving(&[&[2], &[3]]), (Some(2), false));
        assert_eq!(serving(&[&[2]]), (Some(1), false));
    }
}
