//! What weir installs can be listed by every nft there is, leaves other tables alone, and goes away on request.

use std::path::PathBuf;

use weir_tests::{
    assets, cases,
    node::{Place, Topology},
    runner::serve,
    subject::{Kind, Settings, Subject},
};

/// The system's nft, and the others that setup built or the environment names.
fn programs() -> Vec<PathBuf> {
    let mut programs = vec![PathBuf::from("nft")];
    programs.extend(std::env::var_os("WEIR_NFT_EXTRA").map(PathBuf::from));
    if let Ok(entries) = assets::cache().and_then(|cache| Ok(std::fs::read_dir(cache)?)) {
        let names = entries.filter_map(|entry| entry.ok()).map(|entry| entry.path());
        let builds = names
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nft-")));
        programs.extend(
            builds
                .flat_map(|build| [build.join("nft"), build.join("sbin/nft")])
                .filter(|path| path.is_file()),
        );
    }
    programs
}

#[test]
fn every_nft_lists_the_rules_of_all_cases() {
    let topology = Topology::new().unwrap();
    let _servers = serve(&topology).unwrap();
    let node = topology.at(Place::Host(1));
    let foreign = ["add", "table", "inet", "someone"];
    node.stdout("nft", &foreign).unwrap();
    node.stdout("nft", &["add", "chain", "inet", "someone", "elses"]).unwrap();

    let subject = Subject::new(Kind::Weir, &topology).unwrap();
    let all = cases::all().into_iter().map(|case| (case.lot.name(), case.shape.objects(case.lot)));
    subject.publish_all(all).unwrap();
    subject.start(&Settings::default()).unwrap();

    for program in programs() {
        let program = program.to_str().unwrap();
        let listing = node.stdout(program, &["list", "ruleset"]).unwrap();
        for table in ["table ip weir {", "table ip6 weir {", "table inet someone {"] {
            assert!(listing.contains(table), "{program} does not list `{table}`");
        }
        // What is listed can be loaded again.
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &listing).unwrap();
        node.stdout(program, &["--check", "--file", file.path().to_str().unwrap()]).unwrap();
    }

    subject.kill_agent(1).unwrap();
    let weir = assets::weir().unwrap();
    node.stdout(weir.to_str().unwrap(), &["cleanup"]).unwrap();
    let left = node.stdout("nft", &["list", "tables"]).unwrap();
    assert_eq!(left.trim(), "table inet someone", "cleanup takes away what is ours and nothing else");
}
