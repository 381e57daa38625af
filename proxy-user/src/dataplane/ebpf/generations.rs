//! The generations of the maps of Services.
//!
//! In: a directory, and the maps that the attached programs use. Out: the generation to continue with.
//!
//! Maps grow by a new generation: a directory of its own, in which maps that did not grow are pinned too.
//! When programs that use it are attached, the link `current` is switched to it. If an agent is killed
//! meanwhile, attached programs use both generations, or `current` refers to the wrong one. So the next agent
//! decides by the maps that the programs use: their links are switched after the new generation is filled,
//! not before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use super::{
    files::Files,
    place::{Place, number_after},
    problem::Problem,
    repin::{pinned_in, used_by_programs},
    sizes::SERVICES,
};

/// The directory of all generations.
pub(super) struct Generations(PathBuf);

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Serving {
    /// The newest generation that an attached program uses, or else the one of `current`.
    pub(super) generation: Option<u32>,
    /// Whether attached programs use maps of some generation.
    pub(super) attached: bool,
    /// Whether an attached program uses other maps than this generation's.
    pub(super) mixed: bool,
}

impl Generations {
    pub(super) fn of(place: &Place) -> Self {
        Self(place.generations())
    }

    pub(super) fn path(&self, generation: u32) -> PathBuf {
        self.0.join(format!("g{generation}"))
    }

    pub(super) fn all(&self) -> Result<BTreeSet<u32>, Problem> {
        let read = || -> io::Result<BTreeSet<u32>> {
            let mut all = BTreeSet::new();
            for entry in fs::read_dir(&self.0)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    all.extend(entry.file_name().to_str().and_then(|name| number_after(name, "g")));
                }
            }
            Ok(all)
        };
        read().map_err(|error| Problem::file("reading the directory", &self.0, error))
    }

    /// The target of `current`, if it exists.
    pub(super) fn current(&self) -> Option<u32> {
        let target = fs::read_link(self.0.join("current")).ok()?;
        let generation = number_after(target.to_str()?, "g")?;
        self.path(generation).is_dir().then_some(generation)
    }

    /// Switches `current` to a generation.
    pub(super) fn publish(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        files.replace_link(&self.0.join("current"), &format!("g{generation}"))
    }

    pub(super) fn keep(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        for other in self.all()?.into_iter().filter(|other| *other != generation) {
            self.remove(files, other)?;
        }
        Ok(())
    }

    pub(super) fn remove(&self, files: &mut Files, generation: u32) -> Result<(), Problem> {
        let path = self.path(generation);
        files.remove_directory(&path).map_err(|error| Problem::file("removing", &path, error))
    }

    /// The generation to continue with.
    pub(super) fn serving(&self, place: &Place) -> Result<Serving, Problem> {
        let mut generations = BTreeMap::new();
        for generation in self.all()? {
            let maps = pinned_in(&self.path(generation))?;
            generations.insert(generation, maps.into_values().collect());
        }
        let is_of_services = |name: &str| SERVICES.iter().any(|(service, ..)| *service == name);
        let programs: Vec<BTreeSet<u32>> = used_by_programs(place)?
            .into_iter()
            .map(|maps| maps.into_iter().filter(|(name, _)| is_of_services(name)).map(|(_, id)| id).collect())
            .collect();
        Ok(Serving::of(&generations, &programs, self.current()))
    }
}

impl Serving {
    /// `generations` has the maps of each generation, and `programs` the maps of Services that each program
    /// uses. Maps that did not grow belong to several generations.
    fn of(
        generations: &BTreeMap<u32, BTreeSet<u32>>,
        programs: &[BTreeSet<u32>],
        current: Option<u32>,
    ) -> Self {
        let ours = |program: &&BTreeSet<u32>| generations.values().any(|maps| !maps.is_disjoint(program));
        let programs: Vec<&BTreeSet<u32>> = programs.iter().filter(ours).collect();
        let first = |program: &&BTreeSet<u32>| {
            let mut fitting = generations.iter().filter(|(_, maps)| program.is_subset(maps));
            fitting.next().map(|(generation, _)| *generation)
        };
        let generation = programs.iter().filter_map(first).max().or(current);
        let maps = generation.and_then(|generation| generations.get(&generation));
        let fits = |program: &&BTreeSet<u32>| maps.is_some_and(|maps| program.is_subset(maps));
        Self { generation, attached: !programs.is_empty(), mixed: !programs.iter().all(fits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Generation 1 has maps 1 and 2; generation 2 has map 3 in the place of 1, and is the target of
    /// `current`.
    fn serving(programs: &[&[u32]]) -> Serving {
        let set = |maps: &[u32]| maps.iter().copied().collect::<BTreeSet<u32>>();
        let generations = BTreeMap::from([(1, set(&[1, 2])), (2, set(&[2, 3]))]);
        let programs: Vec<BTreeSet<u32>> = programs.iter().map(|maps| set(maps)).collect();
        Serving::of(&generations, &programs, Some(2))
    }

    fn goes_on(generation: u32, attached: bool, mixed: bool) -> Serving {
        Serving { generation: Some(generation), attached, mixed }
    }

    #[test]
    fn the_generation_that_programs_use_serves() {
        assert_eq!(serving(&[]), goes_on(2, false, false), "nothing is attached");
        assert_eq!(serving(&[&[9], &[]]), goes_on(2, false, false), "programs of another layout");
        assert_eq!(serving(&[&[1, 2], &[]]), goes_on(1, true, false), "no link was switched yet");
        assert_eq!(serving(&[&[1, 2], &[2, 3]]), goes_on(2, true, true), "some were");
        assert_eq!(serving(&[&[2, 3], &[2]]), goes_on(2, true, false), "all were");
    }

    #[test]
    fn a_program_with_an_unpinned_map_is_switched() {
        assert_eq!(serving(&[&[1, 2, 9]]), goes_on(2, true, true), "alone");
        assert_eq!(serving(&[&[1, 2], &[2, 9]]), goes_on(1, true, true), "beside one that uses a generation");
    }

    #[test]
    fn a_map_that_did_not_grow_does_not_decide() {
        assert_eq!(serving(&[&[1], &[2]]), goes_on(1, true, false));
        assert_eq!(serving(&[&[2], &[3]]), goes_on(2, true, false));
        assert_eq!(serving(&[&[2]]), goes_on(1, true, false));
    }
}
