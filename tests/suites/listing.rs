//! Every version of nft can list weir's tables; they leave other tables alone, and go away on request.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use weir_tests::{
    assets, cases,
    node::{Location, Topology},
    runner::serve,
    subject::{Kind, Plane, Settings, Subject},
};

/// The system's nft, and those that setup unpacked: of Debian 12 and of Debian 13.
fn programs() -> Result<Vec<PathBuf>> {
    let cache = assets::cache()?;
    let readers = match std::env::var_os("WEIR_NFT_READERS") {
        Some(readers) => std::env::split_paths(&readers).collect(),
        None => ["nft-1.0", "nft-1.1"].map(|reader| cache.join(reader).join("nft")).to_vec(),
    };
    for reader in &readers {
        assert!(reader.is_file(), "{} is missing; run `cargo xtask setup`", reader.display());
    }
    Ok([PathBuf::from("nft")].into_iter().chain(readers).collect())
}

#[test]
fn every_nft_lists_the_rules_of_all_cases() -> Result<()> {
    let topology = Topology::new()?;
    let _servers = serve(&topology)?;
    let node = topology.at(Location::Host(1));
    let foreign = ["add", "table", "inet", "someone"];
    node.stdout("nft", &foreign)?;
    node.stdout("nft", &["add", "chain", "inet", "someone", "elses"])?;

    let subject = Subject::new(Kind::Weir(Plane::Nftables), &topology)?;
    let all =
        cases::all().into_iter().map(|case| (case.addresses.name(), case.shape.objects(case.addresses)));
    subject.publish_all(all)?;
    subject.start(&Settings::default())?;

    for program in programs()? {
        let program = program.to_str().context("a path is not text")?;
        let listing = node.stdout(program, &["list", "ruleset"])?;
        for table in ["table ip weir {", "table ip6 weir {", "table inet someone {"] {
            assert!(listing.contains(table), "{program} does not list `{table}`");
        }
    }

    subject.kill_agent(1)?;
    let weir = assets::weir()?;
    node.stdout(weir.to_str().context("a path is not text")?, &["cleanup"])?;
    let left = node.stdout("nft", &["list", "tables"])?;
    assert_eq!(left.trim(), "table inet someone", "cleanup takes away what is ours and nothing else");
    Ok(())
}
