"""Services from wheels, in user space: what ``latentline demo``, ``latentline up`` and the tests run on."""
