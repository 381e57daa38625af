//! Packs files as an image archive: the layout of the Open Container Initiative, and `manifest.json`, which older Docker
//! versions read.
//!
//! In: a [`Root`] for each architecture, the image's name and its revision. Out: the bytes of the archive, which depend
//! on nothing else.

use std::{collections::HashMap, io::Write as _};

use anyhow::{Context as _, Result};
use flate2::{Compression, GzBuilder};
use oci_spec::image::{
    ANNOTATION_DESCRIPTION, ANNOTATION_LICENSES, ANNOTATION_REF_NAME, ANNOTATION_REVISION, ANNOTATION_TITLE,
    ANNOTATION_VERSION, Arch, ConfigBuilder, Descriptor, Digest, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::root::{Entry, Root};
use crate::architecture::Architecture;

/// The image for one architecture.
pub(super) struct Image {
    pub(super) architecture: Architecture,
    layer: Blob,
    configuration: Blob,
    manifest: Blob,
}

/// Bytes stored under their digest.
struct Blob {
    digest: String,
    content: Vec<u8>,
}

impl Blob {
    fn new(content: Vec<u8>) -> Self {
        Self { digest: digest(&content), content }
    }

    fn json(value: &impl Serialize) -> Result<Self> {
        json_bytes(value).map(Self::new)
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }

    fn descriptor(&self, media_type: MediaType) -> Result<Descriptor> {
        let size = u64::try_from(self.content.len())?;
        Ok(Descriptor::new(media_type, size, Digest::try_from(self.digest.as_str())?))
    }
}

impl Image {
    /// The image of `revision` with `root` as its only layer.
    ///
    /// # Errors
    ///
    /// When the layer cannot be packed.
    pub(super) fn new(architecture: Architecture, root: &Root, revision: Option<&str>) -> Result<Self> {
        let files = layer(root)?;
        let layer = Blob::new(gzip(&files)?);
        let configuration = Blob::json(
            &ImageConfigurationBuilder::default()
                .architecture(goarch(architecture))
                .os(Os::Linux)
                .config(
                    ConfigBuilder::default()
                        .env(vec!["PATH=/usr/local/bin".to_owned()])
                        .entrypoint(vec!["/usr/local/bin/weir".to_owned()])
                        .labels(labels(revision))
                        .build()?,
                )
                .rootfs(RootFsBuilder::default().typ("layers").diff_ids(vec![digest(&files)]).build()?)
                .build()?,
        )?;
        let manifest = Blob::json(
            &ImageManifestBuilder::default()
                .schema_version(2_u32)
                .media_type(MediaType::ImageManifest)
                .config(configuration.descriptor(MediaType::ImageConfig)?)
                .layers(vec![layer.descriptor(MediaType::ImageLayerGzip)?])
                .build()?,
        )?;
        Ok(Self { architecture, layer, configuration, manifest })
    }

    fn descriptor(&self) -> Result<Descriptor> {
        let platform = PlatformBuilder::default().architecture(goarch(self.architecture)).os(Os::Linux);
        let mut descriptor = self.manifest.descriptor(MediaType::ImageManifest)?;
        descriptor.set_platform(Some(platform.build()?));
        Ok(descriptor)
    }
}

/// The archive of `images` with the name `tag`.
///
/// # Errors
///
/// When a name or a file does not fit into the format.
pub(super) fn pack(tag: &str, images: &[Image]) -> Result<Vec<u8>> {
    let first = images.first().context("an image needs a program")?;
    let index = |manifests| {
        let index = ImageIndexBuilder::default().schema_version(2_u32).media_type(MediaType::ImageIndex);
        index.manifests(manifests).build()
    };
    let all = images.iter().map(Image::descriptor).collect::<Result<Vec<_>>>()?;
    let platforms = Blob::json(&index(all)?)?;
    // A name has one descriptor: the manifest, or an index of the manifests of all architectures.
    let mut named = match images {
        [one] => one.descriptor()?,
        _ => platforms.descriptor(MediaType::ImageIndex)?,
    };
    named.set_annotations(Some(names(tag)));
    let layout = OciLayoutBuilder::default().image_layout_version("1.0.0".to_owned()).build()?;
    // Docker before version 25 reads this file only, which has one architecture.
    let docker = json!([{
        "Config": first.configuration.path(), "RepoTags": [tag], "Layers": [first.layer.path()],
    }]);
    let mut files = vec![
        ("oci-layout".to_owned(), json_bytes(&layout)?),
        ("index.json".to_owned(), json_bytes(&index(vec![named])?)?),
        ("manifest.json".to_owned(), json_bytes(&docker)?),
    ];
    let blobs = images.iter().flat_map(|image| [&image.layer, &image.configuration, &image.manifest]);
    let blobs = blobs.chain((images.len() > 1).then_some(&platforms));
    files.extend(blobs.map(|blob| (blob.path(), blob.content.clone())));
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        append(&mut tar, &path, &Entry::File { mode: 0o644, content })?;
    }
    Ok(tar.into_inner()?)
}

/// The files of `root` as a layer.
fn layer(root: &Root) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, entry) in root.entries() {
        append(&mut tar, path, entry)?;
    }
    Ok(tar.into_inner()?)
}

fn append(tar: &mut tar::Builder<Vec<u8>>, path: &str, entry: &Entry) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_mode(0o755);
    let result = match entry {
        Entry::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, format!("{path}/"), &[][..])
        }
        Entry::Link(target) => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            tar.append_link(&mut header, path, target)
        }
        Entry::File { mode, content } => {
            header.set_mode(*mode);
            header.set_size(u64::try_from(content.len())?);
            tar.append_data(&mut header, path, &**content)
        }
    };
    result.with_context(|| format!("packing {path}"))
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    // Without the name and the time of the file, so that the same files give the same bytes.
    let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

fn digest(bytes: &[u8]) -> String {
    let hex = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    format!("sha256:{hex}")
}

/// `value` as JSON with sorted keys, because the order of the crate's maps changes from run to run.
fn json_bytes(value: &impl Serialize) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(&serde_json::to_value(value)?)?)
}

fn goarch(architecture: Architecture) -> Arch {
    match architecture {
        Architecture::Amd64 => Arch::Amd64,
        Architecture::Arm64 => Arch::ARM64,
    }
}

/// Labels that registries and scanners show. The Dockerfile has the same, without the revision.
fn labels(revision: Option<&str>) -> HashMap<String, String> {
    let known = [
        (ANNOTATION_TITLE, "weir"),
        (
            ANNOTATION_DESCRIPTION,
            "A Kubernetes service proxy that replaces kube-proxy, with one agent on each node",
        ),
        (ANNOTATION_VERSION, env!("CARGO_PKG_VERSION")),
        (ANNOTATION_LICENSES, "Apache-2.0 OR MIT"),
    ];
    let revision = revision.map(|revision| (ANNOTATION_REVISION, revision));
    known.into_iter().chain(revision).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// The names of the image: its tag, and the full name, which containerd does not derive from the tag.
fn names(tag: &str) -> HashMap<String, String> {
    let version = tag.rsplit_once(':').map_or("latest", |(_, version)| version);
    HashMap::from([
        (ANNOTATION_REF_NAME.to_owned(), version.to_owned()),
        ("io.containerd.image.name".to_owned(), full_name(tag)),
    ])
}

/// `tag` with the default registry and directory, where it has none.
fn full_name(tag: &str) -> String {
    match tag.split_once('/') {
        None => format!("docker.io/library/{tag}"),
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => tag.to_owned(),
        Some(_) => format!("docker.io/{tag}"),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _, path::Path};

    use serde_json::Value;

    use super::*;
    use crate::{image::elf::Program, machine::Machine};

    fn image() -> Image {
        let binary = std::env::current_exe().unwrap();
        let program = Program::read(&std::fs::read(&binary).unwrap()).unwrap();
        let root = Root::assemble(&Machine::discover().unwrap(), &binary, &program, Path::new("/")).unwrap();
        Image::new(program.architecture, &root, Some("0123abc")).unwrap()
    }

    #[test]
    fn the_image_says_what_it_is_and_of_which_revision() {
        let configuration: Value = serde_json::from_slice(&image().configuration.content).unwrap();
        let labels = &configuration["config"]["Labels"];
        assert_eq!(labels["org.opencontainers.image.title"], "weir");
        assert_eq!(labels["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(labels["org.opencontainers.image.revision"], "0123abc");
    }

    #[test]
    fn the_dockerfile_has_the_same_labels() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Dockerfile");
        let file = std::fs::read_to_string(file).unwrap();
        for (key, value) in labels(None) {
            assert!(file.contains(&format!("{key}=\"{value}\"")), "{key}={value} is not in the Dockerfile");
        }
    }

    fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(entry.path().unwrap().to_string_lossy().into_owned(), content);
        }
        files
    }

    #[test]
    fn every_name_in_the_archive_leads_to_what_it_promises() {
        let files = files(&pack("weir:test", &[image()]).unwrap());
        let parsed = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        let blob = |descriptor: &Value| {
            let digest_of = descriptor["digest"].as_str().unwrap();
            let content = &files[&format!("blobs/{}", digest_of.replace(':', "/"))];
            assert_eq!(digest(content), digest_of);
            assert_eq!(u64::try_from(content.len()).unwrap(), descriptor["size"].as_u64().unwrap());
            content.clone()
        };
        let named = &parsed(&files["index.json"])["manifests"][0];
        let name = &named["annotations"]["io.containerd.image.name"];
        assert_eq!(name, "docker.io/library/weir:test");
        let manifest = parsed(&blob(named));
        let configuration = parsed(&blob(&manifest["config"]));
        let mut layer = Vec::new();
        let packed = blob(&manifest["layers"][0]);
        flate2::read::GzDecoder::new(&*packed).read_to_end(&mut layer).unwrap();
        assert_eq!(configuration["rootfs"]["diff_ids"][0], digest(&layer));
        // The manifest for older Docker names the same files.
        let docker = parsed(&files["manifest.json"]);
        assert!(files.contains_key(docker[0]["Config"].as_str().unwrap()));
        assert!(files.contains_key(docker[0]["Layers"][0].as_str().unwrap()));
        let layer = tests::files(&layer);
        assert!(layer.contains_key("usr/local/bin/weir") && layer.contains_key("usr/local/bin/kube-proxy"));
    }

    #[test]
    fn the_same_program_makes_the_same_archive() {
        assert!(pack("weir:test", &[image()]).unwrap() == pack("weir:test", &[image()]).unwrap());
    }

    #[test]
    fn several_architectures_share_a_name() {
        let other = Image { architecture: Architecture::Arm64, ..image() };
        let first = Image { architecture: Architecture::Amd64, ..image() };
        let files = files(&pack("weir:test", &[first, other]).unwrap());
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let platforms: Value =
            serde_json::from_slice(&files[&format!("blobs/{}", digest.replace(':', "/"))]).unwrap();
        let named = platforms["manifests"].as_array().unwrap().iter();
        let named = named.map(|one| one["platform"]["architecture"].as_str().unwrap()).collect::<Vec<_>>();
        assert_eq!(named, ["amd64", "arm64"]);
    }

    #[test]
    fn short_names_are_those_of_dockers_registry() {
        assert_eq!(full_name("weir:1"), "docker.io/library/weir:1");
        assert_eq!(full_name("team/weir:1"), "docker.io/team/weir:1");
        assert_eq!(full_name("registry.example/weir:1"), "registry.example/weir:1");
        assert_eq!(full_name("localhost/weir:1"), "localhost/weir:1");
    }
}
