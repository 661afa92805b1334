"""Drawing street scenes whose objects are known; `pcenet.data.SceneSource` makes a data set of them."""
