//! The catalogue of programs that hosts may run: adding, listing, removing.
//!
//! Invariant: what is added has a sum; one that the user does not give is taken of the file as this
//! machine sees it.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use slotmesh_proto::{
    artifact::v1::{self as api, artifact_service_client::ArtifactServiceClient},
    store::v1::{Product, ReleaseLevel},
};

use crate::{
    api::{Api, Line},
    failure::Failure,
    render::{Output, Text, note, show, table},
};

#[derive(Debug, Subcommand)]
pub enum ArtifactCommand {
    /// Lists a program, so that instances can be made of it by its name, such as redis-7.0.15.
    ///
    /// Each host fetches it when it needs it, and refuses it when its sum is another, it does not run
    /// there, or it says that it is another version.
    Add(AddArgs),
    /// Every program that is listed.
    List,
    /// Takes a program off the list; refused while an instance is made of it.
    Remove {
        /// Such as redis-7.0.15.
        #[arg(value_name = "NAME")]
        name: String,
    },
}

#[derive(Debug, Clone, Args)]
pub struct AddArgs {
    /// Whose program it is.
    #[arg(value_enum)]
    product: ProductArg,
    /// Three numbers, as the program says of itself.
    #[arg(value_name = "VERSION")]
    version: String,
    /// The program's file, at the same path on every host.
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "url",
        conflicts_with = "url"
    )]
    file: Option<PathBuf>,
    /// Where every host gets the program's file: http:// or https://.
    #[arg(long, value_name = "URL", requires = "sha256")]
    url: Option<String>,
    /// SHA-256 of the file, 64 hexadecimal digits [default: of FILE as it is here].
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// How urgent it is to have it.
    #[arg(long, value_enum, default_value_t = LevelArg::Low)]
    level: LevelArg,
    /// What is new, for people.
    #[arg(long, value_name = "TEXT", default_value = "")]
    note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProductArg {
    /// redis-server.
    Redis,
    /// valkey-server.
    Valkey,
    /// slotmesh-proxy.
    Proxy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LevelArg {
    /// Routine.
    Low,
    /// Recommended.
    Medium,
    /// Important.
    High,
}

#[derive(Debug, Clone, Serialize)]
struct ArtifactView {
    name: String,
    product: &'static str,
    version: String,
    level: &'static str,
    release_note: String,
    sha256: String,
    source: String,
    created_at: String,
}

/// Does an `artifact` command.
///
/// # Errors
/// As the controller answered, or when the file can't be read.
pub async fn on_artifact(
    api: &mut Api,
    command: ArtifactCommand,
    output: Output,
) -> Result<(), Failure> {
    match command {
        ArtifactCommand::Add(args) => add(api, args, output).await,
        ArtifactCommand::List => {
            let request = api::ListArtifactsRequest::default();
            let answer = api
                .call(|api| {
                    let request = request.clone();
                    async move { client(&api).list_artifacts(request).await }
                })
                .await?;
            let views: Vec<_> = answer.artifacts.into_iter().map(view).collect();
            Ok(show(output, &views)?)
        }
        ArtifactCommand::Remove { name } => {
            let request = api::RemoveArtifactRequest {
                client_token: Api::token(None),
                name: name.clone(),
            };
            api.call(|api| {
                let request = request.clone();
                async move { client(&api).remove_artifact(request).await }
            })
            .await?;
            note(&format!("{name} is listed no more"));
            Ok(())
        }
    }
}

async fn add(api: &mut Api, args: AddArgs, output: Output) -> Result<(), Failure> {
    let source = match (&args.file, &args.url) {
        (Some(path), _) => {
            let path = std::path::absolute(path)
                .with_context(|| format!("find the directory of {}", path.display()))?;
            format!("file://{}", path.display())
        }
        (None, url) => url.clone().unwrap_or_default(),
    };
    let sha256 = match (args.sha256, &args.file) {
        (Some(given), _) => given.to_ascii_lowercase(),
        (None, Some(path)) => sum(path)?,
        (None, None) => String::new(),
    };
    let request = api::AddArtifactRequest {
        client_token: Api::token(None),
        artifact: Some(api::Artifact {
            product: match args.product {
                ProductArg::Redis => Product::Redis,
                ProductArg::Valkey => Product::Valkey,
                ProductArg::Proxy => Product::Proxy,
            }
            .into(),
            level: match args.level {
                LevelArg::Low => ReleaseLevel::Low,
                LevelArg::Medium => ReleaseLevel::Medium,
                LevelArg::High => ReleaseLevel::High,
            }
            .into(),
            version: args.version,
            release_note: args.note,
            sha256,
            source,
            ..api::Artifact::default()
        }),
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { client(&api).add_artifact(request).await }
        })
        .await?;
    let views: Vec<_> = answer.artifact.into_iter().map(view).collect();
    Ok(show(output, &views)?)
}

fn client(api: &Api) -> ArtifactServiceClient<Line> {
    api.artifacts()
}

fn sum(path: &Path) -> Result<String, Failure> {
    let read = || -> io::Result<String> {
        let mut sum = Sha256::new();
        io::copy(&mut File::open(path)?, &mut sum)?;
        Ok(hex::encode(sum.finalize()))
    };
    Ok(read().with_context(|| {
        format!(
            "read {}: it must be on this machine too, or give its --sha256",
            path.display()
        )
    })?)
}

fn view(from: api::Artifact) -> ArtifactView {
    ArtifactView {
        product: match from.product() {
            Product::Redis => "redis",
            Product::Valkey => "valkey",
            Product::Proxy => "proxy",
            Product::Unspecified => "",
        },
        level: match from.level() {
            ReleaseLevel::Low => "low",
            ReleaseLevel::Medium => "medium",
            ReleaseLevel::High => "high",
            ReleaseLevel::Unspecified => "",
        },
        name: from.name,
        version: from.version,
        release_note: from.release_note,
        sha256: from.sha256,
        source: from.source,
        created_at: from.created_at,
    }
}

impl Text for Vec<ArtifactView> {
    fn text(&self) -> String {
        table(
            ["NAME", "LEVEL", "SHA256", "SOURCE", "NOTE"],
            self.iter().map(|a| {
                [
                    a.name.clone(),
                    a.level.to_owned(),
                    a.sha256.chars().take(12).collect(),
                    a.source.clone(),
                    a.release_note.lines().next().unwrap_or("-").to_owned(),
                ]
            }),
        )
    }
}
