//! `slotmesh version`: what an instance runs, and what is listed that is newer.

use serde::Serialize;
use slotmesh_proto::{artifact::v1::Artifact, instance::v1 as api, store::v1::ReleaseLevel};

use crate::{
    api::Api,
    failure::Failure,
    render::{Output, Text, show, table},
};

#[derive(Debug, Clone, Serialize)]
struct VersionsView {
    engine: String,
    major_version: String,
    minor_version: String,
    is_latest_version: bool,
    latest: Option<LatestView>,
    nodes: Vec<ProcessView>,
    proxy_minor_version: String,
    is_proxy_latest_version: bool,
    proxy_latest: Option<LatestView>,
    proxies: Vec<ProcessView>,
    upgrade_possible: bool,
    /// Why not.
    upgrade_refused: String,
    upgrades: Vec<UpgradeView>,
    /// From which level on patches are installed by themselves.
    auto_upgrade: &'static str,
    auto_upgrade_next: String,
    /// What it waits for, or why there is none.
    auto_upgrade_why: String,
}

/// What a listed engine would be to it.
#[derive(Debug, Clone, Serialize)]
struct UpgradeView {
    engine: String,
    refused: String,
    way_back_by_copy: bool,
}

#[derive(Debug, Clone, Serialize)]
struct LatestView {
    name: String,
    version: String,
    level: &'static str,
    release_note: String,
}

#[derive(Debug, Clone, Serialize)]
struct ProcessView {
    id: String,
    shard_id: String,
    version: String,
    /// Of a proxy: artifact that it is to run; empty: its agent's own.
    program: String,
}

/// Shows it.
///
/// # Errors
/// As the controller answered.
pub async fn on_version(api: &mut Api, instance: String, output: Output) -> Result<(), Failure> {
    let request = api::DescribeEngineVersionRequest {
        instance_id: instance,
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().describe_engine_version(request).await }
        })
        .await?;
    Ok(show(output, &VersionsView::from(answer))?)
}

impl From<api::DescribeEngineVersionResponse> for VersionsView {
    fn from(from: api::DescribeEngineVersionResponse) -> Self {
        let processes = |all: Vec<api::ProcessVersion>| {
            let view = |p: api::ProcessVersion| ProcessView {
                id: p.id,
                shard_id: p.shard_id,
                version: p.version,
                program: p.program,
            };
            all.into_iter().map(view).collect()
        };
        Self {
            auto_upgrade: match from.auto_upgrade() {
                ReleaseLevel::Unspecified => "off",
                level => level_name(level),
            },
            auto_upgrade_next: from.auto_upgrade_next,
            auto_upgrade_why: from.auto_upgrade_why,
            engine: from.engine,
            major_version: from.major_version,
            minor_version: from.minor_version,
            is_latest_version: from.is_latest_version,
            latest: from.latest.map(LatestView::from),
            nodes: processes(from.nodes),
            proxy_minor_version: from.proxy_minor_version,
            is_proxy_latest_version: from.is_proxy_latest_version,
            proxy_latest: from.proxy_latest.map(LatestView::from),
            proxies: processes(from.proxies),
            upgrade_possible: from.upgrade_possible,
            upgrade_refused: from.upgrade_refused,
            upgrades: from.upgrades.into_iter().map(UpgradeView::from).collect(),
        }
    }
}

impl From<api::Upgrade> for UpgradeView {
    fn from(from: api::Upgrade) -> Self {
        Self {
            engine: from.engine,
            refused: from.refused,
            way_back_by_copy: from.way_back_by_copy,
        }
    }
}

impl UpgradeView {
    fn words(&self) -> String {
        match (self.refused.as_str(), self.way_back_by_copy) {
            ("", true) => "possible, and back by copy".into(),
            ("", false) => "possible; back only until it is finalized".into(),
            (why, _) => format!("refused: {why}"),
        }
    }
}

impl From<Artifact> for LatestView {
    fn from(from: Artifact) -> Self {
        Self {
            level: level_name(from.level()),
            name: from.name,
            version: from.version,
            release_note: from.release_note,
        }
    }
}

fn level_name(level: ReleaseLevel) -> &'static str {
    match level {
        ReleaseLevel::High => "high",
        ReleaseLevel::Medium => "medium",
        ReleaseLevel::Low | ReleaseLevel::Unspecified => "low",
    }
}

impl VersionsView {
    /// What is installed by itself, in a line.
    fn by_itself(&self) -> String {
        let (next, why) = (&self.auto_upgrade_next, &self.auto_upgrade_why);
        match (self.auto_upgrade, next.as_str()) {
            ("off", _) => "off".to_owned(),
            (level, "") => format!("{level} and above; {why}"),
            (level, next) => format!("{level} and above; next is {next}, waiting for {why}"),
        }
    }
}

impl Text for VersionsView {
    fn text(&self) -> String {
        let line = |what: &str, version: &str, is_latest: bool, latest: &Option<LatestView>| {
            let version = if version.is_empty() {
                "unknown"
            } else {
                version
            };
            let newer = match latest {
                Some(l) if !is_latest => {
                    format!("; {} is listed ({}): {}", l.name, l.level, l.release_note)
                }
                _ => String::new(),
            };
            format!("{what:<9} {version}{newer}\n")
        };
        let engine = format!("{} {}", self.engine, self.minor_version);
        let head = line(
            "engine",
            engine.trim(),
            self.is_latest_version,
            &self.latest,
        ) + &line(
            "proxy",
            &self.proxy_minor_version,
            self.is_proxy_latest_version,
            &self.proxy_latest,
        );
        let rows = self.nodes.iter().chain(&self.proxies).map(|p| {
            let or_dash = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
            [
                p.id.clone(),
                or_dash(&p.shard_id),
                or_dash(&p.version),
                or_dash(&p.program),
            ]
        });
        // Another release is never given to who does not name it.
        let latest = self.latest.as_ref().map_or("latest", |l| l.name.as_str());
        let upgrade = match self.upgrade_refused.as_str() {
            "" => format!("possible (slotmesh upgrade INSTANCE --to {latest})"),
            why => why.to_owned(),
        };
        let upgrade = format!("{upgrade}\nby itself {}", self.by_itself());
        let upgrades = self.upgrades.iter().map(|u| [u.engine.clone(), u.words()]);
        let processes = table(["PROCESS", "SHARD", "VERSION", "PROGRAM"], rows);
        if self.upgrades.is_empty() {
            return format!("{head}upgrade   {upgrade}\n\n{processes}");
        }
        let upgrades = table(["LISTED", "UPGRADE"], upgrades);
        format!("{head}upgrade   {upgrade}\n\n{processes}\n{upgrades}")
    }
}
