//! Lists and watches in JSON, by `kube`'s watcher.
//!
//! In: the API server's responses. Out: [`StreamItem`]. `kube`'s watcher fails as a whole and lists again if
//! one object does not have the type of its kind. Therefore it reads [`Lenient`] objects, which can always be
//! parsed.

use std::{borrow::Cow, fmt::Debug};

use futures::{StreamExt as _, stream::BoxStream};
use k8s_openapi::serde_json::Value;
use kube::{
    Api, Client, Resource,
    core::ObjectMeta,
    runtime::watcher::{self, Config, Event},
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};

use super::{
    responses::random_watch_timeout,
    stream_item::{ItemResult, Skipped, StreamItem},
};

/// An endless stream of events of a kind. After an error the next poll tries again.
pub(super) fn events<K>(client: Client, config: Config) -> BoxStream<'static, ItemResult<K>>
where
    K: Resource<DynamicType = ()> + Clone + Default + DeserializeOwned + Debug + Send + 'static,
{
    let events = watcher::watcher(Api::<Lenient<K>>::all(client), config.timeout(random_watch_timeout()));
    events.map(|event| event.map(item)).boxed()
}

/// An object, or only its metadata if the rest cannot be parsed.
#[derive(Clone, Debug)]
struct Lenient<K> {
    object: K,
    /// Why there is only metadata.
    fault: Option<String>,
}

impl<'de, K: Resource + Default + DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(K::deserialize(&value).map_or_else(
            |error| {
                let mut object = K::default();
                *object.meta_mut() = identity(&value);
                Self { object, fault: Some(error.to_string()) }
            },
            |object| Self { object, fault: None },
        ))
    }
}

/// Name, namespace and version of an object.
fn identity(object: &Value) -> ObjectMeta {
    let text = |field: &str| Some(object.get("metadata")?.get(field)?.as_str()?.to_owned());
    ObjectMeta {
        name: text("name"),
        namespace: text("namespace"),
        resource_version: text("resourceVersion"),
        ..ObjectMeta::default()
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Lenient<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        self.object.meta()
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.object.meta_mut()
    }
}

fn item<K: Resource>(event: Event<Lenient<K>>) -> StreamItem<K> {
    match event {
        Event::Init => StreamItem::Event(Event::Init),
        Event::InitDone => StreamItem::Event(Event::InitDone),
        Event::InitApply(object) => object.in_event(Event::InitApply, "a list"),
        Event::Apply(object) => object.in_event(Event::Apply, "an event"),
        // Only the name of a deleted object is used.
        Event::Delete(Lenient { object, .. }) => StreamItem::Event(Event::Delete(object)),
    }
}

impl<K: Resource> Lenient<K> {
    fn in_event(self, event: fn(K) -> Event<K>, position: &str) -> StreamItem<K> {
        match self.fault {
            None => StreamItem::Event(event(self.object)),
            Some(fault) => StreamItem::Skipped(Skipped::new(self.object.meta(), position.to_owned(), &fault)),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{api::core::v1::Pod, serde_json::json};
    use kube::core::WatchEvent;

    use super::*;
    use crate::model::ObjectName;

    #[test]
    fn an_unreadable_object_is_skipped_by_name_and_its_list_continues() {
        let pod = |name: &str, spec: Value| json!({ "metadata": { "namespace": "shop", "name": name, "resourceVersion": "7" }, "spec": spec });
        let good = || json!({ "containers": [] });
        let list = json!({
            "kind": "PodList", "apiVersion": "v1", "metadata": { "resourceVersion": "9" },
            "items": [pod("a", good()), pod("b", json!({ "containers": 5 })), 17, pod("c", good())],
        });
        let list: kube::core::ObjectList<Lenient<Pod>> = serde_json::from_value(list).unwrap();
        let words = list.items.into_iter().map(|pod| match item(Event::InitApply(pod)) {
            StreamItem::Event(Event::InitApply(pod)) => format!("+{}", pod.metadata.name.unwrap()),
            StreamItem::Skipped(Skipped { name, .. }) => {
                format!("skipped {}", name.map_or_else(String::new, |name| name.to_string()))
            }
            StreamItem::Event(other) => panic!("{other:?}"),
        });
        assert_eq!(words.collect::<Vec<_>>(), ["+a", "skipped shop/b", "skipped ", "+c"]);
    }

    #[test]
    fn the_event_of_an_unreadable_object_has_the_version_to_resume_from() {
        let object =
            json!({ "metadata": { "namespace": "shop", "name": "b", "resourceVersion": "8" }, "spec": 1 });
        let event = json!({ "type": "MODIFIED", "object": object.clone() });
        let event: WatchEvent<Lenient<Pod>> = serde_json::from_value(event).unwrap();
        let WatchEvent::Modified(pod) = event else { panic!("{event:?}") };
        assert_eq!(pod.meta().resource_version.as_deref(), Some("8"));
        let StreamItem::Skipped(skipped) = item(Event::Apply(pod)) else {
            panic!("the object is not skipped")
        };
        assert_eq!(skipped.name, Some(ObjectName::new("shop", "b")));
        assert!(skipped.reason.contains("invalid type"), "{}", skipped.reason);

        let gone: Lenient<Pod> = serde_json::from_value(object).unwrap();
        let StreamItem::Event(Event::Delete(pod)) = item(Event::Delete(gone)) else {
            panic!("the object stays")
        };
        assert_eq!(pod.metadata.name.as_deref(), Some("b"));
    }
}
