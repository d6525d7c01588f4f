//! Which files of lost writes are kept, and whom to ask for them.

use slotmesh_proto::{store::v1 as records, task::v1 as api};
use slotmesh_task::admit::RefusalKind;
use slotmesh_topology::{HostId, InstanceId};
use tonic::Status;

use super::Tasks;
use crate::{
    clock,
    grpc::{refuse, store_failed},
    store::keys,
};

impl Tasks {
    /// Of one instance, also when it is deleted, or of all; oldest first.
    pub(super) async fn lost_writes(
        &self,
        request: api::ListLostWritesRequest,
    ) -> Result<Vec<api::LostWrites>, Status> {
        let instance = request.instance_id.as_str();
        let prefix = match instance {
            "" => keys::LOST.to_owned(),
            _ if keys::valid_id(instance) => keys::lost_of(instance),
            _ => return Err(no_such_instance()),
        };
        let listed = self.context.store.list(&prefix).await;
        let mut found = Vec::new();
        for item in listed.map_err(|e| store_failed(&e))?.items {
            let record: records::LostWritesRecord =
                keys::decode(&item).map_err(|e| store_failed(&e))?;
            found.push(record);
        }
        let id = InstanceId::from(instance);
        let known = self.context.mirror.read(|s| s.instances.contains_key(&id));
        if found.is_empty() && !known && !instance.is_empty() {
            return Err(no_such_instance());
        }
        found.sort_by_key(|record| record.unix_ms);
        Ok(found
            .into_iter()
            .map(|record| self.show_lost(record))
            .collect())
    }

    fn show_lost(&self, record: records::LostWritesRecord) -> api::LostWrites {
        let host = HostId::from(record.host_id.as_str());
        let here = self.context.hub.agent_address(&host);
        let stored = || {
            let hosts = self.context.mirror.read(|s| s.hosts.get(&host).cloned());
            hosts.map(|h| h.agent_address)
        };
        api::LostWrites {
            shard_id: record.shard_id,
            epoch: record.epoch,
            node_id: record.node_id,
            host_id: record.host_id,
            agent_address: here.or_else(stored).unwrap_or_default(),
            file: record.file,
            bytes: record.bytes,
            commands: record.commands,
            complete: record.complete,
            time: clock::rfc3339(record.unix_ms),
            sha256: record.sha256,
            why: record.why,
        }
    }
}

fn no_such_instance() -> Status {
    refuse(
        RefusalKind::NotFound,
        "INSTANCE_NOT_FOUND",
        "there is no such instance, and nothing of it is kept; DescribeInstances lists them",
    )
}
