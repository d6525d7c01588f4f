//! Which node was the primary of which epoch, since when, and by whose word.

use slotmesh_proto::{store::v1 as records, task::v1 as api};
use slotmesh_task::admit::RefusalKind;
use slotmesh_topology::InstanceId;
use tonic::Status;

use super::{PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, Tasks};
use crate::{
    clock,
    grpc::{refuse, store_failed},
    store::keys,
};

impl Tasks {
    pub(super) async fn epochs(
        &self,
        request: api::ListEpochsRequest,
    ) -> Result<Vec<api::EpochChange>, Status> {
        let size = match request.page_size {
            0 => PAGE_SIZE_DEFAULT,
            size => size.min(PAGE_SIZE_MAX),
        };
        let id = InstanceId::from(request.instance_id.as_str());
        let known = self.context.mirror.read(|s| s.instances.contains_key(&id));
        if !known || !keys::valid_id(&request.instance_id) {
            return Err(refuse(
                RefusalKind::NotFound,
                "INSTANCE_NOT_FOUND",
                "there is no such instance; DescribeInstances lists them",
            ));
        }
        let prefix = keys::epochs_of(&request.instance_id);
        let listed = self.context.store.list(&prefix).await;
        let mut found = Vec::new();
        for item in listed.map_err(|e| store_failed(&e))?.items {
            let record: records::EpochRecord = keys::decode(&item).map_err(|e| store_failed(&e))?;
            if request.shard_id.is_empty() || request.shard_id == record.shard_id {
                found.push(record);
            }
        }
        found.sort_by_key(|r| std::cmp::Reverse((r.unix_ms, r.epoch)));
        found.truncate(size as usize);
        Ok(found.into_iter().map(show).collect())
    }
}

fn show(record: records::EpochRecord) -> api::EpochChange {
    api::EpochChange {
        shard_id: record.shard_id,
        epoch: record.epoch,
        primary_node_id: record.primary_node_id,
        before_node_id: record.before_node_id,
        cause: record.cause,
        task_id: record.task_id,
        who: record.who,
        term: record.term,
        trace_id: record.trace_id,
        time: clock::rfc3339(record.unix_ms),
    }
}
