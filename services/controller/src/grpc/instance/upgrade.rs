//! ModifyInstanceMinorVersion: which engine is meant, whether it may be, and the task that gives it to
//! an instance's nodes.
//!
//! Invariant: an instance has one upgrade at a time; what is refused is refused before anything is
//! fetched, in words that say what to do.

use prost::Message as _;
use slotmesh_proto::instance::v1 as api;
use slotmesh_task::{
    Spec, Task,
    admit::RefusalKind,
    schedule::Window,
    upgrade::{self, BAKE_MS, HOLD_MS, Method, Options, Planned, TASK_MS_MAX, UpgradePhase},
};
use slotmesh_topology::{
    Instance, InstanceState, Shard,
    artifact::{Artifact, Product, Version, parse_name, parse_reported},
    compatibility::{self, Engine, WayBack},
};
use tonic::Status;
use tracing::info;

use super::{ADMIT_TRIES, Instances, again, busy, new_task};
use crate::{
    clock,
    drive::write::put_instance,
    grpc::{artifact::Artifacts, refuse, refused, token::Token},
};

/// What stands for the newest listed patch of the release that the nodes run.
const LATEST: &str = "latest_version";
/// Shards that come first where nothing else is said.
const CANARY_SHARDS: u32 = 1;

impl Instances {
    pub(super) async fn admit_upgrade(
        &self,
        request: api::ModifyInstanceMinorVersionRequest,
    ) -> Result<api::ModifyInstanceMinorVersionResponse, Status> {
        let body = api::ModifyInstanceMinorVersionRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let body = body.encode_to_vec();
        let token = Token::of(&request.client_token, "ModifyInstanceMinorVersion", &body)?;
        for _ in 0..ADMIT_TRIES {
            let term = self.context.leading()?;
            if let Some(earlier) = self.earlier(&token).await? {
                return Ok(api::ModifyInstanceMinorVersionResponse {
                    task_id: earlier.task.to_string(),
                    plan: None,
                });
            }
            let (instance, revision) = self.instance(&request.instance_id)?;
            let (planned, plan) = self.plan_upgrade(&instance, &request).await?;
            if request.plan_only || planned.nothing_to_do {
                return Ok(api::ModifyInstanceMinorVersionResponse {
                    task_id: String::new(),
                    plan: Some(plan),
                });
            }
            again::check_alone(&self.context, &instance.id, again::is_upgrade)?;
            // Written as it is: of two upgrades admitted at the same time one has to look again.
            let txn = put_instance(term.txn(), revision, &instance);
            let task = Task {
                not_before_ms: begins_ms(&planned, &instance),
                ..new_task(&instance.id, Spec::Upgrade(planned.upgrade), TASK_MS_MAX)
            };
            if let Some(done) = self.admit(txn, &task, &token, "").await? {
                info!(task = %done.task, instance = %instance.id, engine = plan.engine, "upgrade admitted");
                return Ok(api::ModifyInstanceMinorVersionResponse {
                    task_id: done.task.to_string(),
                    plan: Some(plan),
                });
            }
        }
        Err(busy())
    }

    async fn plan_upgrade(
        &self,
        instance: &Instance,
        request: &api::ModifyInstanceMinorVersionRequest,
    ) -> Result<(Planned, api::UpgradePlan), Status> {
        if instance.state != InstanceState::Running {
            return Err(refuse(
                RefusalKind::Precondition,
                "INSTANCE_NOT_RUNNING",
                format!("instance {} is not running", instance.id),
            ));
        }
        let listed = Artifacts::new(self.context.clone()).list().await?;
        let shards = self.plain_shards(instance);
        let from = self.engines(&shards);
        let oldest = from.iter().min_by_key(|(_, version)| *version);
        let product = oldest.map(|(product, _)| *product);
        let patch = || newest_patch(&from, &listed);
        let to = meant(&request.minor_version, product, patch, &listed)?;
        let options = options(request, to);
        let planned = self.context.hub.read(|fleet| {
            let plan = upgrade::plan(instance, &shards, fleet, &options, clock::now_ms());
            plan.map(|planned| {
                let version = |node: &_| fleet.node(node).map(|n| n.version.clone());
                let shown = show(&planned, instance, &shards, |node| {
                    version(node).unwrap_or_default()
                });
                (planned, shown)
            })
        });
        planned.map_err(|r| refused(&r))
    }

    pub(super) fn plain_shards(&self, instance: &Instance) -> Vec<Shard> {
        let shards = self.context.mirror.read(|s| s.shards_of(&instance.id));
        let mut plain: Vec<Shard> = shards.into_iter().map(|s| s.value).collect();
        plain.sort_by_key(|s| s.index);
        plain
    }

    /// What the nodes have said they run, each once.
    fn engines(&self, shards: &[Shard]) -> Vec<Engine> {
        self.context.hub.read(|fleet| {
            let members = shards.iter().flat_map(|s| &s.members);
            let mut engines: Vec<Engine> = members
                .filter_map(|m| fleet.node(&m.node))
                .filter_map(|n| parse_reported(&n.version))
                .collect();
            engines.sort_unstable();
            engines.dedup();
            engines
        })
    }

    /// What each listed engine would be to the instance, and whether the newest of them may be had now.
    pub(super) async fn upgrades(
        &self,
        instance: &Instance,
        latest: Option<&str>,
    ) -> Result<(String, Vec<api::Upgrade>), Status> {
        let listed = Artifacts::new(self.context.clone()).list().await?;
        let shards = self.plain_shards(instance);
        let request = api::ModifyInstanceMinorVersionRequest::default();
        let refused = self.context.hub.read(|fleet| {
            let Some(to) = latest.and_then(parse_name) else {
                return "no version of its engine that it may be given is listed (slotmesh artifact \
                        add)"
                    .to_owned();
            };
            let options = options(&request, to);
            match upgrade::plan(instance, &shards, fleet, &options, clock::now_ms()) {
                Err(refusal) => refusal.message,
                Ok(planned) if planned.nothing_to_do => "every node runs it already".to_owned(),
                Ok(_) => String::new(),
            }
        });
        let from = self.engines(&shards);
        let others = listed.iter().filter(|a| a.product.is_engine());
        let others = others.filter(|a| from != [(a.product, a.version)]);
        Ok((refused, others.map(|a| possible(&from, a)).collect()))
    }
}

fn possible(from: &[Engine], artifact: &Artifact) -> api::Upgrade {
    let to = (artifact.product, artifact.version);
    let ways = from.iter().map(|from| compatibility::upgrade(*from, to));
    let (mut by_copy, mut refused) = (true, String::new());
    for way in ways {
        match way {
            Ok(way) => by_copy &= way == WayBack::ByCopy,
            Err(why) => refused = why.to_string(),
        }
    }
    api::Upgrade {
        engine: artifact.name(),
        way_back_by_copy: by_copy && refused.is_empty(),
        refused,
    }
}

/// The newest listed patch of the release that all nodes run, none older than what one of them runs.
/// Another release may have no way back, so somebody has to name it.
#[allow(clippy::result_large_err)]
fn newest_patch(from: &[Engine], listed: &[Artifact]) -> Result<Engine, Status> {
    let Some(highest) = from.iter().max_by_key(|(_, version)| *version).copied() else {
        return Err(unknown());
    };
    if from.iter().any(|e| compatibility::knows_more(*e, highest)) {
        return Err(refuse(
            RefusalKind::Precondition,
            "RELEASES_DIFFER",
            "its nodes run several releases, so say which version is meant (slotmesh upgrade --to \
             VERSION); slotmesh version lists those that it may be given",
        ));
    }
    let listed = listed.iter().map(|a| (a.product, a.version));
    let patches = listed.filter(|e| !compatibility::knows_more(highest, *e) && e.1 >= highest.1);
    patches.max_by_key(|(_, version)| *version).ok_or_else(|| {
        let name = compatibility::name(highest);
        let message = format!(
            "neither {name} nor a newer patch of its release is listed: add one (slotmesh artifact \
             add), or name another release's version (slotmesh upgrade --to VERSION)"
        );
        refuse(RefusalKind::NotFound, "ARTIFACT_NOT_FOUND", message)
    })
}

fn unknown() -> Status {
    refuse(
        RefusalKind::Unavailable,
        "VERSION_UNKNOWN",
        "no node has said which engine it runs: are the agents running? try again then",
    )
}

/// The program that is meant: its number alone is one of `product`, nothing is the latest. It has to be
/// listed.
#[allow(clippy::result_large_err)]
pub(super) fn meant(
    text: &str,
    product: Option<Product>,
    latest: impl FnOnce() -> Result<Engine, Status>,
    listed: &[Artifact],
) -> Result<Engine, Status> {
    let engine = match (parse_name(text), Version::parse(text)) {
        _ if matches!(text, "" | LATEST) => latest()?,
        (Some(engine), _) => engine,
        (None, Some(version)) => (product.ok_or_else(unknown)?, version),
        (None, None) => {
            return Err(refuse(
                RefusalKind::Invalid,
                "VERSION_INVALID",
                format!(
                    "{text:?} is no version such as 7.0.15, no artifact's name such as redis-7.0.15, \
                     and not {LATEST}"
                ),
            ));
        }
    };
    if listed.iter().any(|a| (a.product, a.version) == engine) {
        return Ok(engine);
    }
    let name = compatibility::name(engine);
    Err(refuse(
        RefusalKind::NotFound,
        "ARTIFACT_NOT_FOUND",
        format!(
            "{name} is not listed, so hosts can't fetch it; add it first (slotmesh artifact add)"
        ),
    ))
}

fn options(request: &api::ModifyInstanceMinorVersionRequest, to: Engine) -> Options {
    let bake_ms = request.bake_seconds.map(|s| u64::from(s) * 1_000);
    Options {
        to,
        bake_ms: bake_ms.unwrap_or(BAKE_MS),
        canary_shards: request.canary_shards.unwrap_or(CANARY_SHARDS),
        parallel_shards: request.parallel_shards,
        finalize_by_operator: request.finalize() == api::FinalizeBy::Operator,
        preserve_roles: request.preserve_roles,
        in_window: request.effective_time() == api::EffectiveTime::MaintainTime,
        allow_downtime: request.allow_downtime,
        automatic: false,
        method: match request.method() {
            api::UpgradeMethod::Unspecified | api::UpgradeMethod::Auto => Method::Auto,
            api::UpgradeMethod::InPlace => Method::InPlace,
            api::UpgradeMethod::CrossHost => Method::CrossHost,
        },
        max_hold_ms: request.max_hold_ms.unwrap_or(HOLD_MS),
    }
}

/// When its shards begin; 0: when every host has tried the engine.
fn begins_ms(planned: &Planned, instance: &Instance) -> u64 {
    let now_ms = clock::now_ms();
    let window = Window::read(&instance.maintenance_window).ok();
    let window = window.filter(|_| planned.upgrade.in_window);
    let opens_ms = window.map_or(0, |w| w.next_ms(now_ms));
    match opens_ms > now_ms {
        true => opens_ms,
        false => 0,
    }
}

fn show(
    planned: &Planned,
    instance: &Instance,
    shards: &[Shard],
    version: impl Fn(&slotmesh_topology::NodeId) -> String,
) -> api::UpgradePlan {
    let mut canaries = planned.upgrade.canary_shards;
    let parts = planned.upgrade.shards.iter().zip(shards);
    let shards = parts.map(|(part, shard)| {
        let mut members: Vec<_> = shard.members.iter().collect();
        members.sort_by_key(|m| m.node == shard.primary);
        let node = |m: &&slotmesh_topology::Member| api::NodePlan {
            node_id: m.node.to_string(),
            host_id: m.host.to_string(),
            version: version(&m.node),
            primary: m.node == shard.primary,
        };
        let canary = canaries > 0;
        canaries = canaries.saturating_sub(1);
        api::ShardPlan {
            shard_id: shard.id.to_string(),
            nodes: members.iter().map(node).collect(),
            canary,
            nothing_to_do: part.phase == UpgradePhase::Done,
            moved: part.moved,
        }
    });
    let begins_ms = begins_ms(planned, instance);
    api::UpgradePlan {
        engine: planned.upgrade.engine.clone(),
        shards: shards.collect(),
        remarks: planned.remarks.clone(),
        begins_at: clock::rfc3339(begins_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::instance::listed;

    #[test]
    fn a_number_is_of_the_nodes_own_product_and_a_name_may_cross_over() {
        let catalogue = ["redis-7.0.15", "redis-8.2.3", "valkey-8.0.1"].map(listed);
        let redis = Some(Product::Redis);
        let of = |text, product| meant(text, product, || Err(unknown()), &catalogue);
        let name = |text, product| of(text, product).map(compatibility::name).unwrap();
        assert_eq!(name("8.2.3", redis), "redis-8.2.3");
        assert_eq!(name("valkey-8.0.1", redis), "valkey-8.0.1");
        for (text, product, code) in [
            ("7.0.9", redis, tonic::Code::NotFound),
            ("7.0.15", None, tonic::Code::Unavailable),
            ("newest", redis, tonic::Code::InvalidArgument),
        ] {
            assert_eq!(of(text, product).unwrap_err().code(), code, "{text:?}");
        }
    }

    #[test]
    fn the_latest_is_a_patch_of_the_release_that_the_nodes_run_and_never_an_older_one() {
        let names = ["redis-7.0.15", "redis-8.2.3", "redis-8.4.0", "valkey-8.0.1"];
        let catalogue = names.map(listed);
        let of = |runs: &[&str]| {
            let from: Vec<Engine> = runs.iter().filter_map(|r| parse_reported(r)).collect();
            for text in ["", LATEST] {
                let latest = || newest_patch(&from, &catalogue);
                let found = meant(text, None, latest, &catalogue);
                assert_eq!(found.ok(), newest_patch(&from, &catalogue).ok());
            }
            newest_patch(&from, &catalogue)
                .map(compatibility::name)
                .map_err(|e| e.code())
        };
        assert_eq!(of(&["7.0.9", "7.0.15"]), Ok("redis-7.0.15".into()));
        assert_eq!(of(&["valkey-8.0.0"]), Ok("valkey-8.0.1".into()));
        // Of a release that is not in the table, too.
        assert_eq!(of(&["8.4.0"]), Ok("redis-8.4.0".into()));
        assert_eq!(of(&["7.0.16"]), Err(tonic::Code::NotFound));
        assert_eq!(of(&["7.2.4"]), Err(tonic::Code::NotFound));
        let both = of(&["7.0.15", "8.2.3"]);
        assert_eq!(both, Err(tonic::Code::FailedPrecondition));
        assert_eq!(of(&[]), Err(tonic::Code::Unavailable));
    }

    #[test]
    fn each_listed_engine_says_whether_it_may_be_had_and_whether_one_could_copy_back() {
        let from = [parse_reported("7.0.15").unwrap()];
        let of = |name| possible(&from, &listed(name));
        let patch = of("redis-7.0.16");
        assert!(patch.refused.is_empty() && patch.way_back_by_copy);
        let next = of("redis-8.2.3");
        assert!(next.refused.is_empty() && !next.way_back_by_copy);
        assert!(of("redis-6.2.14").refused.contains("lose the data"));
    }
}
