//! `ArtifactService`: the catalogue of programs that hosts may run.
//!
//! Invariant: a name stands for one program for as long as it is listed. It can be added again only
//! as it is, or after it was removed; and it is not removed while an instance is made of it.

use std::collections::BTreeSet;

use prost::Message as _;
use slotmesh_proto::artifact::v1::{self as api, artifact_service_server::ArtifactService};
use slotmesh_task::{Spec, Task, admit::RefusalKind};
use slotmesh_topology::{
    Instance, ProxyId, Shard,
    artifact::{self, Artifact},
    wire,
};
use tonic::{Request, Response, Status};
use tracing::info;

use super::{Context, refuse, store_failed, token::Token};
use crate::{
    clock,
    leader::LeaderOutcome,
    store::{
        Store, StoreError,
        keys::{self, Key},
    },
};

/// Programs that are listed: a listing is one message, and hosts read it every minute.
pub const ARTIFACTS_MAX: usize = 1_000;

/// The whole catalogue, the newest of each product first.
///
/// # Errors
/// When the store does not answer, or has a record that this release can't read.
pub(crate) async fn listed(store: &dyn Store) -> Result<Vec<Artifact>, StoreError> {
    let mut found = Vec::new();
    for item in store.list(keys::ARTIFACTS).await?.items {
        let artifact = wire::artifact::from_record(keys::decode(&item)?);
        found.push(artifact.map_err(|error| StoreError::Corrupt {
            reason: format!("{}: {error}", item.key),
            source: None,
        })?);
    }
    found.sort_by_key(|a| (a.product, std::cmp::Reverse(a.version)));
    Ok(found)
}

/// The service.
#[derive(Clone, Debug)]
pub struct Artifacts {
    context: Context,
}

impl Artifacts {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    async fn find(&self, name: &str) -> Result<Option<(Artifact, u64)>, Status> {
        let key = Key::Artifact { name }.to_string();
        let found = self.context.store.get(&key).await;
        let Some(item) = found.map_err(|e| store_failed(&e))? else {
            return Ok(None);
        };
        let record = keys::decode(&item).map_err(|e| store_failed(&e))?;
        let artifact = wire::artifact::from_record(record);
        let artifact = artifact.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Some((artifact, item.mod_revision)))
    }

    pub(super) async fn list(&self) -> Result<Vec<Artifact>, Status> {
        let listed = listed(&*self.context.store).await;
        listed.map_err(|e| store_failed(&e))
    }

    /// An instance whose nodes are made of it.
    fn user(&self, name: &str) -> Option<String> {
        let running = self.proxies_that_run(name);
        self.context.mirror.read(|state| {
            let mut instances = state.instances.values().map(|i| &i.value);
            let is_made_of_it = |i: &Instance| {
                let mut proxies = i.proxies.iter();
                i.engine == name || proxies.any(|p| p.program == name || running.contains(&p.proxy))
            };
            let of_instance = instances.find(|i| is_made_of_it(i)).map(|i| &i.id);
            let runs_it = |s: &Shard| s.members.iter().any(|m| m.engine == name);
            let mut shards = state.shards.values().map(|s| &s.value);
            let of_node = shards.find(|s| runs_it(s)).map(|s| &s.instance);
            let goes_there = |t: &&Task| match &t.spec {
                Spec::Upgrade(u) => u.engine == name && (!t.state.is_ended() || t.is_parked()),
                Spec::Proxies(p) => {
                    let goes_back = p.proxies.iter().any(|p| p.from_program == name);
                    (p.program == name || goes_back) && (!t.state.is_ended() || t.is_parked())
                }
                _ => false,
            };
            let mut tasks = state.tasks.values().map(|t| &t.value);
            let of_task = tasks.find(goes_there).map(|t| &t.instance);
            of_instance.or(of_node).or(of_task).map(ToString::to_string)
        })
    }

    /// Proxies with a process that was started from it, one that serves or one that may again.
    fn proxies_that_run(&self, name: &str) -> BTreeSet<ProxyId> {
        let is_it = |program: &Option<String>| program.as_deref() == Some(name);
        self.context.hub.read(|fleet| {
            let processes = fleet.proxy_processes.iter();
            processes
                .filter(|(_, p)| is_it(&p.program) || is_it(&p.spare))
                .map(|(proxy, _)| proxy.clone())
                .collect()
        })
    }

    async fn add(&self, request: api::AddArtifactRequest) -> Result<Artifact, Status> {
        let body = api::AddArtifactRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(&request.client_token, "AddArtifact", &body.encode_to_vec())?;
        let invalid = |why: String| refuse(RefusalKind::Invalid, "ARTIFACT_INVALID", why);
        let given = request.artifact.unwrap_or_default();
        let artifact = Artifact {
            created_unix_ms: clock::now_ms(),
            ..wire::artifact::from_message(given).map_err(invalid)?
        };
        let name = artifact.name();
        let term = self.context.leading()?;
        if let Some(earlier) = token.earlier(&self.context).await?
            && let Some((listed, _)) = self.find(&earlier.resource_id).await?
        {
            return Ok(listed);
        }
        let before = self.find(&name).await?;
        if let Some((listed, _)) = &before
            && !listed.is_same_program(&artifact)
        {
            return Err(refuse(
                RefusalKind::AlreadyExists,
                "ARTIFACT_EXISTS",
                format!(
                    "{name} is listed already, from {} with another sum or source; remove it first",
                    listed.source
                ),
            ));
        }
        if before.is_none() && self.list().await?.len() >= ARTIFACTS_MAX {
            return Err(refuse(
                RefusalKind::Precondition,
                "ARTIFACTS_FULL",
                format!("{ARTIFACTS_MAX} artifacts are listed; remove some that nothing uses"),
            ));
        }
        let key = Key::Artifact { name: &name }.to_string();
        let txn = match before {
            Some((_, revision)) => term.txn().unchanged(key.clone(), revision),
            None => term.txn().absent(key.clone()),
        };
        let txn = txn.put(key, keys::encode(wire::artifact::to_record(&artifact)));
        let txn = token.put(txn, "", &name);
        self.committed(txn.commit(&*self.context.store).await)?;
        info!(artifact = %name, source = %artifact.source, "artifact added");
        Ok(artifact)
    }

    async fn remove(&self, request: api::RemoveArtifactRequest) -> Result<(), Status> {
        let body = api::RemoveArtifactRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(
            &request.client_token,
            "RemoveArtifact",
            &body.encode_to_vec(),
        )?;
        let term = self.context.leading()?;
        if token.earlier(&self.context).await?.is_some() {
            return Ok(());
        }
        let name = request.name;
        let found = match artifact::parse_name(&name) {
            Some(_) => self.find(&name).await?,
            None => None,
        };
        let Some((_, revision)) = found else {
            return Err(no_such(&name));
        };
        if let Some(instance) = self.user(&name) {
            return Err(refuse(
                RefusalKind::Precondition,
                "ARTIFACT_IN_USE",
                format!("instance {instance} is made of {name}; it is listed until none is"),
            ));
        }
        let key = Key::Artifact { name: &name }.to_string();
        let txn = term.txn().unchanged(key.clone(), revision).delete(key);
        let txn = token.put(txn, "", &name);
        self.committed(txn.commit(&*self.context.store).await)?;
        info!(artifact = %name, "artifact removed");
        Ok(())
    }

    #[allow(clippy::result_large_err)]
    fn committed(
        &self,
        outcome: Result<LeaderOutcome, crate::store::StoreError>,
    ) -> Result<(), Status> {
        match outcome.map_err(|e| store_failed(&e))? {
            LeaderOutcome::Committed { .. } => Ok(()),
            LeaderOutcome::Conflict => Err(refuse(
                RefusalKind::Conflict,
                "ARTIFACT_CHANGED",
                "the artifact was changed at the same time; look at it and try again",
            )),
            LeaderOutcome::Deposed => Err(self.context.leading().err().unwrap_or_else(|| {
                refuse(
                    RefusalKind::Unavailable,
                    "NOT_LEADER",
                    "another controller leads now; try again",
                )
            })),
        }
    }
}

fn no_such(name: &str) -> Status {
    refuse(
        RefusalKind::NotFound,
        "ARTIFACT_NOT_FOUND",
        format!("no artifact {name:?} is listed; ListArtifacts shows which are"),
    )
}

pub(super) fn show(artifact: &Artifact) -> api::Artifact {
    api::Artifact {
        created_at: clock::rfc3339(artifact.created_unix_ms),
        ..wire::artifact::to_message(artifact)
    }
}

#[tonic::async_trait]
impl ArtifactService for Artifacts {
    async fn add_artifact(
        &self,
        request: Request<api::AddArtifactRequest>,
    ) -> Result<Response<api::AddArtifactResponse>, Status> {
        let artifact = Some(show(&self.add(request.into_inner()).await?));
        Ok(Response::new(api::AddArtifactResponse { artifact }))
    }

    async fn list_artifacts(
        &self,
        request: Request<api::ListArtifactsRequest>,
    ) -> Result<Response<api::ListArtifactsResponse>, Status> {
        let name = request.into_inner().name;
        let artifacts = if name.is_empty() {
            self.list().await?
        } else if artifact::parse_name(&name).is_some() {
            let found = self.find(&name).await?;
            found.into_iter().map(|(artifact, _)| artifact).collect()
        } else {
            Vec::new()
        };
        let artifacts = artifacts.iter().map(show).collect();
        Ok(Response::new(api::ListArtifactsResponse { artifacts }))
    }

    async fn remove_artifact(
        &self,
        request: Request<api::RemoveArtifactRequest>,
    ) -> Result<Response<api::RemoveArtifactResponse>, Status> {
        self.remove(request.into_inner()).await?;
        Ok(Response::new(api::RemoveArtifactResponse {}))
    }
}
